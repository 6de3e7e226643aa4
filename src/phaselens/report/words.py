"""Words and numbers as a person reads them; what comes from files or models is made harmless first."""

from __future__ import annotations

from collections.abc import Sequence

from phaselens.plugin import Cell

MISSING = "–"


def plain(text: str) -> str:
    """`text` on one line, with control characters (a terminal's escape codes among them) spelled out.

    >>> plain("a\\x1b[31m\\nb")
    'a\\\\x1b[31m b'
    """
    joined = " ".join(text.split()) if any(sign in text for sign in "\n\r\t\v\f") else text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in joined)


def shortened(text: str, width: int) -> str:
    """`plain(text)` with its middle left out where it is longer than `width`.

    >>> shortened("organisation/a-model-with-a-long-name", 20)
    'organisati…long-name'
    """
    text = plain(text)
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


def number(value: Cell, *, percent: bool = False, digits: int = 3) -> str:
    """A cell of a table as text: `–` where it is missing.

    >>> number(0.625, percent=True), number(0.2345678), number(None), number(7)
    ('62.5 %', '0.235', '–', '7')
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return plain(value)
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def interval(low: Cell, high: Cell, *, percent: bool = False, digits: int = 3) -> str:
    """The two ends of an interval: `50.0–75.0`, or `–` where it is missing."""
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return MISSING
    if percent:
        return f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{low:,.{digits}f}–{high:,.{digits}f}"


def heading(column: str) -> str:
    """A column's name as words: `sink_rate` → `sink rate`."""
    return column.replace("_", " ")


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A list in aligned columns, for what must appear at once and needs no drawing.

    >>> print(columns(["name", "size"], [["a", "10"]]))
    name  size
    a     10
    """
    lines = [list(titles), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
