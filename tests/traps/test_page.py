"""The generated tables: how numbers are written, compared and put on the page."""

from __future__ import annotations

import math

import pytest
from tools.traps.bench import Trap, TrapNumbers
from tools.traps.page import agree, disagreements, number, row, stored_rows, with_rows, written

PAGE = """# Traps

<!-- generated: Pads -->
| model | quantity | float64 | PhaseLens | script |
|---|---|---|---|---|
| `rope` | a score | 0.1 | 0.1 | 0.2 |
| `smollm2` | a score | 0.3 | 0.3 | – |
<!-- end of Pads -->
"""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (0.30202778, "0.302"), (25102.3, "25,100"), (-6134.2, "−6,134"), (2.1e-4, "0.0002"),
        (7e-5, "7e-05"), (-0.00495, "−0.00495"),
        (1.4e-4, "0.0001"), (3e-6, "< 1e-5"), (math.inf, "∞"), (17.0, "17"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_four_digits(value: float | None, text: str) -> None:
    assert written(value) == text
    assert math.isnan(number(text)) == (value is None)


def test_numbers_agree_within_the_rounding_of_another_machine() -> None:
    for first, second in (
        ("0.302", "0.3025"),
        ("0.0001", "0.0003"),
        ("–", "–"),
        ("∞", "∞"),
        ("< 1e-5", "1e-05"),
    ):
        assert agree(first, second)
    for first, second in (("0.302", "0.304"), ("0.0001", "0.0005"), ("–", "0"), ("∞", "90"), ("1", "−1")):
        assert not agree(first, second)


def test_rows_of_models_that_were_not_measured_stay() -> None:
    trap = Trap("Pads", "a score", 0.1, lambda bench: TrapNumbers(None, None, None))
    measured = {"Pads": [row("rope", trap, TrapNumbers(0.5, 0.5, 0.75))]}
    page = with_rows(PAGE, measured)
    assert stored_rows(page)["Pads"] == [
        ("rope", "a score", "0.5", "0.5", "0.75"),
        ("smollm2", "a score", "0.3", "0.3", "–"),
    ]
    assert disagreements(page, measured) == []
    assert len(disagreements(PAGE, measured)) == 1
    assert len(disagreements(PAGE, {"Other": measured["Pads"]})) == 1
    with pytest.raises(ValueError, match="Other"):
        with_rows(PAGE, {"Other": []})
