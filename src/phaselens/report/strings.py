"""Text for display: control characters escaped, long names shortened, lists in aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_GAP = "  "
_MIN_LAST_WIDTH = 20
_STEP = "    "
#: Up to so many columns, a list that does not fit is stacked; wider output is a file's, or scrolls.
_NARROW = 80


def printable(text: str) -> str:
    """Return `text` on one line, with control characters (terminal escape codes among them) escaped.

    >>> printable("a\\x1b[31m\\nb")
    'a\\\\x1b[31m b'
    """
    line = " ".join(text.split()) if any(character in text for character in "\n\r\t\v\f") else text
    return escaped(line)


def escaped(text: str) -> str:
    """Return `text` with control characters escaped, line ends among them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shortened(text: str, width: int) -> str:
    """Return `printable(text)`, without its middle if it is longer than `width`.

    >>> shortened("organisation/a-model-with-a-long-name", 20)
    'organisati…long-name'
    """
    text = printable(text)
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


def heading(column: str) -> str:
    """Return a column's name with spaces: `sink_rate` → `sink rate`."""
    return column.replace("_", " ")


def _stacked(cells: Sequence[str], width: int) -> str:
    """Return the first cell, and below it the others, indented and broken at words."""
    first, *others, last = cells
    lines = [first]
    for part in (_GAP.join(others), last):
        lines += textwrap.wrap(
            part,
            width,
            initial_indent=_STEP,
            subsequent_indent=_STEP,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def aligned_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None
) -> list[str]:
    """Format titles and rows in left-aligned columns; with `width`, the last column is broken into lines at words.

    Where that leaves the last column too narrow, in up to 80 columns, each row is stacked: its first cell, and the
    others indented below.

    rich is not imported, so that commands that print lists start fast.

    >>> aligned_columns(["name", "size"], [["a", "10"]])
    ['name  size', 'a     10']
    >>> aligned_columns(["a", "b"], [["x", "one two three four five six"]], width=24)
    ['a  b', 'x  one two three four\\n   five six']
    """
    cells = [list(titles), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles) - 1)]
    indent = sum(widths) + len(_GAP) * len(widths)
    if width is not None and width <= _NARROW and indent + _MIN_LAST_WIDTH > width:
        return [_stacked(line, width) for line in cells]
    lines = []
    for *names, last in cells:
        parts = [last]
        if width is not None:
            last_width = max(width - indent, _MIN_LAST_WIDTH)
            parts = textwrap.wrap(last, last_width, break_long_words=False, break_on_hyphens=False) or [""]
        line = _GAP.join([*map(str.ljust, names, widths), parts[0]]).rstrip()
        lines.append("\n".join([line, *(" " * indent + part for part in parts[1:])]))
    return lines
