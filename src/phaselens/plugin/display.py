"""Declarations of how a metric's results are shown: on a terminal, in reports, and as figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from phaselens.errors import close_matches, is_list_like
from phaselens.plugin.author_errors import author_error, describe_value
from phaselens.plugin.tables import TableSpec


@dataclass(frozen=True)
class Display:
    """The display of a metric: one of its tables, with `rows` (layers or conditions) down and models across.

    `value` is the column shown, `low` and `high` the ends of its interval, `null` its null value. A layer
    whose value is `strong` or more, and over its null, is coloured and marked; `strong_means` says what
    such a value means. `also` holds more columns of the same table, each with its heading; where conditions are the
    rows, those in `before` precede the value. `summary` holds columns of the `summary` table, each with its
    heading, for the line under each model. Numbers have `digits` decimals.

    `by_head` names a column of the table `heads` that is drawn as a picture of layers × heads. `row_title` heads the
    names of the rows where conditions are the rows, but are no conditions (bins of positions, lengths).
    """

    value: str
    title: str
    table: str = "layers"
    rows: Literal["layer", "condition"] = "layer"
    low: str | None = None
    high: str | None = None
    null: str | None = None
    percent: bool = False
    strong: float | None = None
    strong_means: str = ""
    also: tuple[tuple[str, str], ...] = ()
    summary: tuple[tuple[str, str], ...] = ()
    digits: int = 3
    by_head: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    row_title: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "title", "table", "strong_means", "row_title"):
            _require_text(name, getattr(self, name))
        for name in ("low", "high", "null", "by_head"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        if not isinstance(self.percent, bool):
            raise author_error(f"Display(percent={self.percent!r}): give True or False")
        if isinstance(self.digits, bool) or not isinstance(self.digits, int) or self.digits < 0:
            raise author_error(f"Display(digits={self.digits!r}): give a whole number from 0")
        if self.strong is not None and (
            isinstance(self.strong, bool) or not isinstance(self.strong, int | float)
        ):
            raise author_error(f"Display(strong={self.strong!r}): give a number")
        for name in ("also", "summary", "before"):
            _require_headings(name, getattr(self, name))
        if self.rows not in ("layer", "condition"):
            raise author_error(f"Display(rows={self.rows!r}): give 'layer' or 'condition'")

    def missing_column(self, tables: Sequence[TableSpec]) -> str | None:
        """Return a message that names the first column of the display that `tables` lack; None if they have all."""
        declared = {table.name: {column.name for column in table.columns} for table in tables}
        columns_shown = {
            self.value,
            self.low,
            self.high,
            self.null,
            *(column for column, _ in (*self.before, *self.also)),
            "layer",
            self.rows,
        }
        required: dict[str, set[str | None]] = {"summary": {column for column, _ in self.summary}}
        required.setdefault(self.table, set()).update(columns_shown)
        if self.by_head:
            required.setdefault("heads", set()).update({self.by_head, "layer", "head"})
        for table, columns in required.items():
            missing = sorted(column for column in columns - declared.get(table, set()) if column)
            if missing:
                advice = (
                    close_matches(missing[0], declared[table])
                    if table in declared
                    else "the metric declares no table of this name"
                )
                return f"table {table} has no column {missing[0]}; {advice}"
        return None


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise author_error(f"Display({name}=…) is {describe_value(value)}; give text")


def _require_headings(name: str, headings: Iterable[object]) -> None:
    """Raise TypeError unless `headings` holds pairs of a column and its heading."""
    if not is_list_like(headings):
        raise author_error(f"Display({name}=…) is {describe_value(headings)}; give pairs (column, heading)")
    for pair in headings:
        if not (
            isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        ):
            raise author_error(
                f"Display({name}=…) holds {describe_value(pair)}; give pairs (column, heading)"
            )


@dataclass(frozen=True)
class FigureSet:
    """Figures of several metrics that belong together. `phaselens run --figures` draws each as `NAME-PANEL`.

    `panels` names all panels in their order. A run that has all of them also draws `NAME-summary`, with all panels on
    one page. Metrics contribute to a set by `figure_panels`.
    """

    name: str
    panels: tuple[str, ...]

    def __post_init__(self) -> None:
        names: object = self.panels
        if not isinstance(self.name, str) or not self.name:
            raise author_error(f"a figure set's name is {describe_value(self.name)}; give text")
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise author_error(
                f"FigureSet {self.name!r}: panels is {describe_value(names)}; give a tuple of names"
            )


@dataclass(frozen=True)
class FigurePanel:
    """One panel of a figure set: `display` by layer, one line per model.

    `name` is one of the set's panels. With `summary_only` the panel is drawn on the summary page only.

    >>> FigurePanel(FigureSet("norms", ("first", "median")), "median", Display("median", "median norm")).display.title
    'median norm'
    """

    figure_set: FigureSet
    name: str
    display: Display
    summary_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.figure_set, FigureSet):
            raise author_error(
                f"FigurePanel: figure_set is {describe_value(self.figure_set)}; give a FigureSet"
            )
        if self.name not in self.figure_set.panels:
            panels = ", ".join(self.figure_set.panels)
            raise author_error(
                f"FigurePanel: name is {describe_value(self.name)}; figure set {self.figure_set.name!r} has {panels}"
            )
        if not isinstance(self.display, Display) or self.display.rows != "layer":
            raise author_error(
                f"FigurePanel {self.name!r}: display is {describe_value(self.display)}; "
                "give a Display with rows='layer'"
            )
        if not isinstance(self.summary_only, bool):
            raise author_error(
                f"FigurePanel {self.name!r}: summary_only is {describe_value(self.summary_only)}; give True or False"
            )
