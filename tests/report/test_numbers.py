"""Numbers as text: few characters, and a number that differs from its reference value looks different."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaselens.plugin import CellValue, Column
from phaselens.report.numbers import NumberFormat, reference_value


@pytest.mark.parametrize(
    ("value", "null", "text"),
    [
        (None, 1.0, "–"),
        (7, None, "7"),
        ("a\x1b", None, "a\\x1b"),
        (1.0, 1.0, "1"),
        (0.0, 0.0, "0"),
        (1.0003, 1.0, "1.0003"),
        (0.99996, 1.0, "1.0000"),
        (1.0003, None, "1.000"),
        (0.0003, 0.0, "0.0003"),
        (-0.00003, 0.0, "-3e-5"),
        (9.996, 1.0, "10.0"),
        (54.2309, None, "54.2"),
        (99.96, None, "100"),
        (1815.2, 1.0, "1,815"),
        (99_999.0, 1.0, "99,999"),
        (99_999.6, 1.0, "1.0e5"),
        (1e6, 1.0, "1.0e6"),
        (-123_456.0, 0.0, "-1.2e5"),
    ],
)
def test_a_number_in_about_five_characters(value: float | None, null: float | None, text: str) -> None:
    assert NumberFormat("compact", reference=null).write(value) == text


@given(st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False))
def test_only_zero_is_shown_as_zero(value: float) -> None:
    text = NumberFormat("compact", reference=0.0).write(value)
    assert (float(text.replace(",", "")) == 0) == (value == 0)
    assert len(text) <= 7 or abs(value) < 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0002, "<.001"), (0.0009999, "<.001"), (0.001, ".001"), (0.03125, ".031"), (0.9996, ">.999"),
        (1.0, "1"), (1, "1"),
    ],
)  # fmt: skip
def test_p_is_never_zero_and_one_only_for_one(value: float | None, text: str) -> None:
    assert NumberFormat("p_value").write(value) == text


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_p_is_five_characters_at_most(value: float) -> None:
    text = NumberFormat("p_value").write(value)
    assert len(text) <= 5
    assert float(text.lstrip("<>")) == pytest.approx(value, abs=1e-3)


def test_intervals_keep_their_ends_apart() -> None:
    assert NumberFormat("compact", reference=1.0).write_interval(0.9995, 1.0011) == "0.9995–1.001"
    assert NumberFormat("compact", reference=0.0).write_interval(-0.0491, -0.0081) == "-0.049…-0.008"
    assert NumberFormat("compact").write_interval(None, 1.0) == "–"


def test_reference_values_follow_the_unit() -> None:
    units = {"ratio": 1.0, "nats": 0.0, "nats/token": 0.0, "sd": None, None: None}
    assert {unit: reference_value(Column("a", float, unit)) for unit in units} == units


@pytest.mark.parametrize(
    ("value", "percent", "expected"),
    [
        (None, False, "–"),
        (None, True, "–"),
        (0.0, True, "0.0 %"),
        (1.0, True, "100.0 %"),
        (0.12345, False, "0.123"),
        (20480, False, "20,480"),
        ("a\tb", False, "a b"),
    ],
)
def test_decimals_and_percents(value: CellValue, percent: bool, expected: str) -> None:
    assert NumberFormat("percent" if percent else "decimal").write(value) == expected


def test_intervals_of_decimals_and_percents() -> None:
    assert NumberFormat("percent").write_interval(0.5, 0.75) == "50.0–75.0"
    assert NumberFormat().write_interval(0.5, 0.75) == "0.500–0.750"
    assert NumberFormat().write_interval(None, 0.75) == "–"
