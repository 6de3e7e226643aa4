"""Numbers in few characters: nothing that differs from the null value is shown as if it did not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaselens.plugin import Column
from phaselens.report import numbers


@pytest.mark.parametrize(
    ("value", "null", "shown"),
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
def test_a_number_in_about_five_characters(value: float | None, null: float | None, shown: str) -> None:
    assert numbers.compact(value, null) == shown


@given(st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False))
def test_only_zero_is_shown_as_zero(value: float) -> None:
    shown = numbers.compact(value, 0.0)
    assert (float(shown.replace(",", "")) == 0) == (value == 0)
    assert len(shown) <= 7 or abs(value) < 1e-9


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0.0002, "<.001"), (0.0009999, "<.001"), (0.001, ".001"), (0.03125, ".031"), (0.9996, ">.999"),
        (1.0, "1"), (1, "1"),
    ],
)  # fmt: skip
def test_p_is_never_zero_and_one_only_where_it_is(value: float | None, shown: str) -> None:
    assert numbers.p_value(value) == shown


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_p_is_five_characters_at_most(value: float) -> None:
    shown = numbers.p_value(value)
    assert len(shown) <= 5
    assert float(shown.lstrip("<>")) == pytest.approx(value, abs=1e-3)


def test_intervals_keep_their_ends_apart() -> None:
    assert numbers.interval(0.9995, 1.0011, 1.0) == "0.9995–1.001"
    assert numbers.interval(-0.0491, -0.0081, 0.0) == "-0.049…-0.008"
    assert numbers.interval(None, 1.0, 1.0) == "–"


def test_where_nothing_happens() -> None:
    units = {"ratio": 1.0, "nats": 0.0, "nats/token": 0.0, "sd": None, None: None}
    assert {unit: numbers.null_of(Column("a", float, unit)) for unit in units} == units
