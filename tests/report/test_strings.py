"""Control characters of texts from models and files are escaped."""

from hypothesis import given
from hypothesis import strategies as st

from phaselens.report.strings import aligned_columns, printable, shortened


@given(st.text())
def test_plain_text_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()


def test_escape_codes_are_escaped_and_line_ends_become_spaces() -> None:
    assert printable("red \x1b[31m\nline\x07") == "red \\x1b[31m line\\x07"
    assert printable("  two  spaces stay") == "  two  spaces stay"
    assert printable("naïve – 漢字") == "naïve – 漢字"


@given(st.text(st.characters(categories=["L"])), st.integers(3, 20))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shortened(text, width)
    assert len(short) <= width
    assert short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short)


def test_columns_are_aligned() -> None:
    assert aligned_columns(["a", "b"], [["longer", "x"], ["y", "z"]]) == [
        "a       b",
        "longer  x",
        "y       z",
    ]


def test_a_list_that_leaves_too_little_for_its_last_column_is_stacked() -> None:
    titles, rows = (
        ["plugin", "kind", "measures"],
        [["attention-patterns", "observational", "entropy of attention"]],
    )
    assert aligned_columns(titles, rows, width=50) == [
        "plugin\n    kind\n    measures",
        "attention-patterns\n    observational\n    entropy of attention",
    ]
    assert aligned_columns(titles, rows, width=56)[0] == "plugin              kind           measures"
