"""LaTeX output: complete rows, balanced braces, and nothing that LaTeX would interpret."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import phaselens
from phaselens.report.formats.latex import escaped
from tests.report.runs import made_run, written, written_table
from tests.toys import letters, toy_lens

# A command, an escaped character or inline mathematics.
_COMMAND = re.compile(r"\\[A-Za-z]+(\{\})?|\\[^A-Za-z]|\$[^$]*\$")


def tabulars(text: str) -> list[tuple[str, list[str]]]:
    """Return the column types and the rows of each table."""
    blocks = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    return [(types, [row for row in body.splitlines() if row.endswith(r"\\")]) for types, body in blocks]


def width(row: str) -> int:
    """Return the number of columns of a row, with those that a heading spans."""
    cells = re.split(r"(?<!\\)&", row)
    spans = (re.search(r"\\multicolumn\{(\d+)\}", cell) for cell in cells)
    return sum(int(span[1]) if span else 1 for span in spans)


@pytest.mark.slow
def test_every_row_has_as_many_cells_as_the_table_has_columns() -> None:
    lenses = [toy_lens(seed=0, label="a"), toy_lens(seed=1, label="b_c & 50 %")]
    texts = [letters(6), letters(9, 3), letters(7, 5)]
    run = phaselens.run(lenses, metrics=["sinks", "bos-mlp", "massive-values"], texts=texts)
    text = written(run, "latex")
    tables = tabulars(text)
    assert len(tables) == 7
    for types, rows in tables:
        assert {width(row) for row in rows} == {len(types)}
    assert r"\multicolumn{3}{c}{b\_c \& 50 \%}" in text
    outside_comments = [line for line in text.splitlines() if not line.startswith("%")]
    assert "\n".join(outside_comments).isascii()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\caption{") == 7


def test_the_numbers_are_those_of_the_terminal() -> None:
    text = written(made_run(), "latex")
    assert re.search(r"1 & .*62\.5 \\% & 50\.0--75\.0 & 2\.0 \\%", text)


def test_one_table_is_written_in_full() -> None:
    types, rows = tabulars(written_table(made_run(), "latex"))[0]
    assert len(rows) == 7
    assert len(types) == 8
    assert r"sink\_rate" in rows[0]
    assert r"\label{tab:sinks.layers}" in written_table(made_run(), "latex")


def test_a_failure_is_a_comment() -> None:
    assert re.search(r"^% failed: ", written(made_run(failed=True), "latex"), re.MULTILINE)


@given(st.text(max_size=40))
def test_text_stays_text(text: str) -> None:
    left = _COMMAND.sub("", escaped(text))
    assert not re.search(r"[\\{}$&#%_~^|<>\n]", left)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("‖x₀‖ ≥ 2", r"$\|$x$_0$$\|$ $\geq$ 2"),
        ("a\x1b[31m", r"a\textbackslash{}x1b[31m"),
        ("1–2…3", r"1--2\dots{}3"),
    ],
)
def test_signs_become_commands(text: str, expected: str) -> None:
    assert escaped(text) == expected
