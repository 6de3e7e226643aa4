"""A metric's display as a grid of texts: layers down, models across. The printed forms are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import Cell, Display
from phaselens.report import words
from phaselens.runs import MetricResult, Run

MARK = "●"


@dataclass(frozen=True)
class Entry:
    """One layer of one model: a cell for each of the grid's titles."""

    cells: tuple[str, ...]
    strong: bool


@dataclass(frozen=True)
class Grid:
    """`entries[row][model]` for `layers[row]`; `lines` is one line a model, with the titles of its cells.

    The first title is that of the value that may be marked; `null` is the place of the null's, or None.
    """

    layers: list[str]
    models: list[str]
    entries: list[list[Entry | None]]
    titles: tuple[str, ...]
    null: int | None
    line_titles: list[str]
    lines: list[list[str]]

    @property
    def any_strong(self) -> bool:
        """Whether a layer is marked."""
        return any(entry is not None and entry.strong for row in self.entries for entry in row)


def layer_grid(run: Run, result: MetricResult, display: Display) -> Grid:
    """The grid that `display` describes; a model whose table is missing has empty places."""
    found = {
        (record["model"], _layer(record)): _entry(record, display)
        for record in _records(result, display.table)
    }
    labels = [model.info.label for model in run.models]
    layers = sorted({layer for _, layer in found})
    return Grid(
        [str(layer) for layer in layers],
        labels,
        [[found.get((label, layer)) for label in labels] for layer in layers],
        _titles(display),
        _titles(display).index("null") if display.null else None,
        ["model", *(title for _, title in display.summary), "texts", "tokens", "positions", "dtype"],
        _lines(run, result, display),
    )


def _titles(display: Display) -> tuple[str, ...]:
    interval = ("95 % interval",) if display.low else ()
    null = ("null",) if display.null else ()
    return (display.title, *interval, *null, *(title for _, title in display.also))


def _records(result: MetricResult, table: str) -> list[dict[str, Cell]]:
    return result.tables[table].records() if table in result.tables else []


def _layer(record: dict[str, Cell]) -> int:
    layer = record["layer"]
    if not isinstance(layer, int):
        raise TypeError(f"a display needs whole numbers in the column `layer`, found {layer!r}")
    return layer


def _entry(cells: dict[str, Cell], display: Display) -> Entry:
    value = cells[display.value]
    low, high, null = (cells[name] if name else None for name in (display.low, display.high, display.null))
    form: dict[str, Any] = {"percent": display.percent, "digits": display.digits}
    shown = [words.number(value, **form)]
    if display.low:
        shown.append(words.interval(low, high, **form))
    if display.null:
        shown.append(words.number(null, **form))
    shown += [words.number(cells[name], **form) for name, _ in display.also]
    return Entry(
        tuple(shown), _reaches(value, display.strong) and (null is None or not _reaches(null, value))
    )


def _reaches(value: Cell, bound: Cell) -> bool:
    return isinstance(value, int | float) and isinstance(bound, int | float) and value >= bound


def _lines(run: Run, result: MetricResult, display: Display) -> list[list[str]]:
    summaries = {record["model"]: record for record in _records(result, "summary")}
    lines = []
    for model in run.models:
        cells = summaries.get(model.info.label, {})
        averages = [
            words.number(
                cells.get(name), percent=display.percent and name == display.value, digits=display.digits
            )
            for name, _ in display.summary
        ]
        n_texts = words.number(cells.get("n_texts", len(run.texts)))
        tokens, positions = words.number(model.n_tokens), model.info.positions_summary
        lines.append([words.plain(model.info.label), *averages, n_texts, tokens, positions, model.info.dtype])
    return lines


_POLICY = {
    "auto": "auto (position 0 as the model's tokenizer makes it)",
    "always": "always (one BOS token at position 0)",
    "never": "never (no token is added before a text)",
}


def bos_line(run: Run) -> str:
    """The BOS policy of the run, explained; or by model where they differ, `bos: rope auto, drope never`."""
    policies = {model.info.label: model.bos for model in run.models}
    if len(set(policies.values())) == 1:
        return f"bos: {_POLICY[next(iter(policies.values()))]}"
    return "bos: " + ", ".join(f"{words.plain(label)} {policy}" for label, policy in policies.items())


def plain_rows(run: Run, metric: str, table: str) -> tuple[Sequence[str], list[list[str]]]:
    """Any result table as texts: its column names and its rows."""
    found = run.rows(metric, table)
    return [column.name for column in found.spec.columns], [
        [words.number(cell, digits=4) for cell in row] for row in found.rows
    ]
