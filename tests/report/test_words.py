"""Texts from models and files are made harmless; numbers are readable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaselens.report import words


@given(st.text())
def test_plain_text_is_one_printable_line(text: str) -> None:
    assert words.plain(text).isprintable()


def test_escape_codes_and_line_ends_are_spelled_out() -> None:
    assert words.plain("red \x1b[31m\nline\x07") == "red \\x1b[31m line\\x07"
    assert words.plain("  two  spaces stay") == "  two  spaces stay"
    assert words.plain("naïve – 漢字") == "naïve – 漢字"


@given(st.text(st.characters(categories=["L"])), st.integers(3, 20))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = words.shortened(text, width)
    assert len(short) <= width
    assert short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short)


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
def test_numbers(value: object, percent: bool, expected: str) -> None:
    assert words.number(value, percent=percent) == expected  # type: ignore[arg-type]


def test_intervals() -> None:
    assert words.interval(0.5, 0.75, percent=True) == "50.0–75.0"
    assert words.interval(0.5, 0.75) == "0.500–0.750"
    assert words.interval(None, 0.75) == "–"


def test_columns_are_aligned() -> None:
    assert words.columns(["a", "b"], [["longer", "x"], ["y", "z"]]).splitlines() == [
        "a       b",
        "longer  x",
        "y       z",
    ]
