"""A section that a metric adds to the HTML report."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from phaselens.errors import is_list_like
from phaselens.plugin.author_errors import author_error, describe_value
from phaselens.plugin.tables import CellValue


@dataclass(frozen=True)
class ReportSection:
    """A title, paragraphs, and a small table. Everything is shown as text: markup in it is not interpreted.

    `columns` are the headings of the table, and `rows` its cells: str, int, finite float, or None for a missing value.

    >>> ReportSection("Reading", ("Heads 3 and 5 agree.",), ("head", "share"), ((3, 0.25), (5, None))).title
    'Reading'
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[CellValue, ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.title, str) or not self.title:
            raise author_error(f"a report section's title is {describe_value(self.title)}; give text")
        for name in ("paragraphs", "columns"):
            texts: object = getattr(self, name)
            if not is_list_like(texts) or not all(isinstance(text, str) for text in getattr(self, name)):
                raise author_error(
                    f"report section {self.title!r}: {name} is {describe_value(texts)}; give a tuple of text"
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not is_list_like(self.rows) or not all(map(is_list_like, self.rows)):
            raise author_error(
                f"report section {self.title!r}: rows is {describe_value(self.rows)}; give a tuple of rows"
            )
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise author_error(
                    f"report section {self.title!r}: a row has {len(row)} cells for {len(self.columns)} columns"
                )
            for cell in row:
                if not _is_cell(cell):
                    raise author_error(
                        f"report section {self.title!r}: a cell is {describe_value(cell)}; give text, a finite number "
                        "or None"
                    )


def _is_cell(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, str) or (isinstance(value, int | float) and isfinite(value))
