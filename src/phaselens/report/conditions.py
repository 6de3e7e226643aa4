"""A causal metric's display as a grid: conditions down, models across, controls beneath what they control.

What is special about causal metrics here is what every one of them has (`CAUSAL_TABLES`): columns of the table
`conditions`, and the table `contrasts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from phaselens.plugin import BASELINE, Cell, Column, Display, Table
from phaselens.report import numbers, words
from phaselens.report.grid import MARK
from phaselens.runs import MetricResult, Run

Record: TypeAlias = dict[str, Cell]
Key: TypeAlias = tuple[str, int]
"""A condition's name, and which of its occurrences in its model it is."""

#: Of all differences from controls in one model together, by chance.
LEVEL = 0.05
BEYOND = (
    "the ratio's interval excludes 1, and the difference from each of its controls lies on the same side, with "
    f"p ≤ {LEVEL:g} over the number of differences"
)

_BETWEEN = " :,;–—-()"
#: Heads the second table.
DIFFERENCES = "condition − control, text by text; repeats of a control are averaged first"


@dataclass(frozen=True)
class Row:
    """What stands before the cells: `name` in full; `brief` where the row above says the rest; whether a control."""

    name: str
    brief: str
    control: bool = False


@dataclass(frozen=True)
class Entry:
    """One condition in one model: a cell for each of the grid's titles."""

    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class ConditionGrid:
    """`entries[row][model]` for `rows[row]`. `marked` is the place of the value that is marked where it is strong.

    `briefly` are the titles where there is little room. `null` is the place of the null's value, or None.
    """

    stub: str
    rows: list[Row]
    models: list[str]
    entries: list[list[Entry | None]]
    titles: tuple[str, ...]
    briefly: tuple[str, ...]
    marked: int | None = None
    null: int | None = None

    @property
    def any_strong(self) -> bool:
        """Whether a condition is marked."""
        return any(entry is not None and entry.strong for row in self.entries for entry in row)

    def written(self, entry: Entry | None) -> tuple[str, ...]:
        """The cells of one place, with the mark."""
        if entry is None:
            return (words.MISSING,) * len(self.titles)
        return tuple(
            f"{MARK} {cell}" if entry.strong and place == self.marked else cell
            for place, cell in enumerate(entry.cells)
        )


def aligned(models: Sequence[Iterable[str]]) -> list[Key]:
    """The rows of all models as one list: a name's n-th occurrence in one model stands beside that in others.

    What only some models have comes after what it follows there; the baseline comes first.

    >>> aligned([["baseline", "a", "b"], ["baseline", "a", "a", "b"]])
    [('baseline', 0), ('a', 0), ('a', 1), ('b', 0)]
    """
    merged: list[Key] = []
    for names in models:
        after = 0
        for key in occurrences(names):
            if key not in merged:
                merged.insert(after, key)
            after = merged.index(key) + 1
    return sorted(merged, key=lambda key: key[0] != BASELINE.name)


def occurrences(names: Iterable[str]) -> list[Key]:
    """Each name with how many times it has been there before."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        found.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return found


def records(result: MetricResult, table: str, model: str) -> list[Record]:
    """One model's rows of a table; none where the table is missing."""
    if table not in result.tables:
        return []
    return [record for record in result.tables[table].records() if record["model"] == model]


def text(record: Mapping[str, Cell], column: str) -> str:
    """A cell of a column of texts."""
    value = record[column]
    if not isinstance(value, str):
        raise TypeError(f"a display needs text in the column `{column}`, found {value!r}")
    return value


def labels(run: Run) -> list[str]:
    """Of the models."""
    return [model.info.label for model in run.models]


def condition_grid(run: Run, result: MetricResult, display: Display) -> ConditionGrid:
    """The grid that `display` describes; a model without a condition has an empty place."""
    models = labels(run)
    found = {model: records(result, display.table, model) for model in models}
    keys = aligned([[text(record, "condition") for record in found[model]] for model in models])
    places = any(record["layer"] is not None for mine in found.values() for record in mine)
    shown = _Shown(display, _columns(result.tables.get(display.table)), places)
    entries: dict[tuple[str, Key], Entry] = {}
    for model in models:
        names = occurrences(text(record, "condition") for record in found[model])
        beyond = _beyond(found[model], records(result, "contrasts", model))
        for key, record in zip(names, found[model], strict=True):
            layer = record["layer"]
            strong = shown.strong(record) or (key[0], layer if isinstance(layer, int) else None) in beyond
            entries[model, key] = Entry(shown.cells(record), strong)
    return ConditionGrid(
        "condition",
        _rows(keys, control_of(result)),
        models,
        [[entries.get((model, key)) for model in models] for key in keys],
        shown.titles("layer", "95 % interval"),
        shown.titles("at", "95 % CI"),
        shown.marked,
        shown.null,
    )


def contrast_grid(run: Run, result: MetricResult) -> ConditionGrid | None:
    """What conditions do beyond their controls; None where nothing has a control."""
    models = labels(run)
    found = {model: records(result, "contrasts", model) for model in models}
    every = [record for mine in found.values() for record in mine]
    if not every or not _CONTRASTS.issubset(every[0]):
        return None
    places = any(record["layer"] is not None for record in every)
    keys = aligned([[_difference(record) for record in found[model]] for model in models])
    entries: dict[tuple[str, Key], Entry] = {}
    for model in models:
        for key, record in zip(
            occurrences(_difference(record) for record in found[model]), found[model], strict=True
        ):
            cells = (
                numbers.compact(record["delta_nats"], 0.0),
                numbers.interval(record["ci_low"], record["ci_high"], 0.0),
                numbers.p_value(record["p_value"]),
                numbers.compact(record["d_z"], digits=2),
                numbers.compact(record["n_seeds"]),
            )
            entries[model, key] = Entry((*([_layer(record)] if places else []), *cells))
    names = [Row(name, name) for name, _ in keys]
    where = (("layer",), ("at",)) if places else ((), ())
    rest = ("Δ nats", "95 % interval", "p", "d_z", "seeds"), ("Δ nats", "95 % CI", "p", "d_z", "seeds")
    return ConditionGrid(
        "difference",
        [
            Row(row.name, "" if place and names[place - 1] == row else row.name)
            for place, row in enumerate(names)
        ],
        models,
        [[entries.get((model, key)) for model in models] for key in keys],
        (*where[0], *rest[0]),
        (*where[1], *rest[1]),
    )


_CONTRASTS = {
    "condition", "control", "layer", "delta_nats", "ci_low", "ci_high", "p_value", "d_z", "n_seeds",
}  # fmt: skip


def _difference(record: Record) -> str:
    condition, control = text(record, "condition"), text(record, "control")
    return f"{condition} − {without(control, condition)}"


def without(control: str, condition: str) -> str:
    """A control's name where that of its condition stands beside it.

    >>> without("other position: write layer", "write layer"), without("top-1-random", "top-1")
    ('other position', 'random')
    >>> without("bos-mlp: other position: write layer", "bos-mlp: write layer")
    'other position'
    """
    rest = re.sub(rf"(?<!\w){re.escape(condition)}(?!\w)", "", control)
    if rest == control:
        own, others = control.split(), condition.split()
        first = _shared(own, others)
        last = _shared(own[first:][::-1], others[first:][::-1])
        rest = " ".join(own[first : len(own) - last])
    return rest.strip(_BETWEEN) or control


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def control_of(result: MetricResult) -> dict[str, str]:
    """The condition that each control is one of, by name."""
    if "contrasts" not in result.tables:
        return {}
    return {
        text(record, "control"): text(record, "condition") for record in result.tables["contrasts"].records()
    }


def _rows(keys: Sequence[Key], control_of: Mapping[str, str]) -> list[Row]:
    """A control right beneath its condition is indented; what the rows above say already is not said again."""
    rows: list[Row] = []
    above: Key | None = None
    for name, n in keys:
        of = control_of.get(name)
        if of is not None and above == (of, n):
            alone = list(control_of.values()).count(of) == 1
            rows.append(Row(name, "└" if n and alone else f"└ {without(name, of)}", control=True))
            continue
        again = above is not None and above[0] == name
        rows.append(Row(name, "" if again else name, control=of is not None))
        above = name, n
    return rows


def _layer(record: Record) -> str:
    layer = record["layer"]
    return words.MISSING if layer is None else f"L{layer}"


def _columns(table: Table | None) -> dict[str, Column]:
    return {column.name: column for column in table.spec.columns} if table is not None else {}


@dataclass(frozen=True)
class _Shown:
    """Which cells of a record are shown, and how."""

    display: Display
    columns: Mapping[str, Column]
    places: bool

    @property
    def marked(self) -> int:
        return self.places + len(self.display.before)

    @property
    def null(self) -> int | None:
        return self.marked + 1 + bool(self.display.low) if self.display.null else None

    def titles(self, layer: str, interval: str) -> tuple[str, ...]:
        display = self.display
        return (
            *([layer] if self.places else []),
            *(title for _, title in display.before),
            display.title,
            *([interval] if display.low else []),
            *(["null"] if display.null else []),
            *(title for _, title in display.also),
        )

    def cells(self, record: Record) -> tuple[str, ...]:
        display = self.display
        shown = [_layer(record)] if self.places else []
        shown += [self.cell(record, name) for name, _ in display.before]
        shown.append(self.cell(record, display.value))
        if display.low and display.high:
            shown.append(self._interval(record[display.low], record[display.high]))
        if display.null:
            shown.append(self.cell(record, display.null))
        return (*shown, *(self.cell(record, name) for name, _ in display.also))

    def cell(self, record: Record, name: str) -> str:
        return number(record[name], self.columns[name], self.display)

    def _interval(self, low: Cell, high: Cell) -> str:
        column = self.columns[self.display.value]
        if is_share(column, self.display):
            return words.interval(low, high, percent=True)
        return numbers.interval(low, high, numbers.null_of(column), digits=self.display.digits)

    def strong(self, record: Record) -> bool:
        """As in a display by layer: at least `strong`, and no less than its null."""
        value, bound = record[self.display.value], self.display.strong
        if not isinstance(value, int | float) or bound is None or value < bound:
            return False
        null = record[self.display.null] if self.display.null else None
        return null is None or (isinstance(null, int | float) and value >= null)


def is_share(column: Column, display: Display) -> bool:
    """Whether a column is shown in percent."""
    unit = column.unit or ""
    return display.percent and (unit.startswith(("share", "fraction")) or column.name == display.value)


def number(value: Cell, column: Column, display: Display) -> str:
    """A cell, in the way that its column asks for."""
    if column.name == "p_value":
        return numbers.p_value(value)
    if is_share(column, display):
        return words.number(value, percent=True)
    return numbers.compact(value, numbers.null_of(column), digits=display.digits)


def _beyond(conditions: Sequence[Record], contrasts: Sequence[Record]) -> set[tuple[str, int | None]]:
    """Conditions (name, layer) that do something, and something else than each of their controls (see `BEYOND`)."""
    if not conditions or not {"delta_nats", "delta_low", "delta_high"} <= set(conditions[0]):
        return set()
    sides = {
        _place(record): _side(record["delta_low"], record["delta_high"], 0.0, 0.0) for record in conditions
    }
    found: dict[tuple[str, int | None], list[bool]] = {}
    for record in contrasts:
        side = _side(record["ci_low"], record["ci_high"], record["p_value"], LEVEL / len(contrasts))
        found.setdefault(_place(record), []).append(side != 0 and side == sides.get(_place(record)))
    return {place for place, agree in found.items() if all(agree)}


def _place(record: Record) -> tuple[str, int | None]:
    layer = record["layer"]
    return text(record, "condition"), layer if isinstance(layer, int) else None


def _side(low: Cell, high: Cell, p_value: Cell, level: float) -> int:
    """1 above 0, −1 below it; 0 where that is not known."""
    if not (isinstance(low, float) and isinstance(high, float) and isinstance(p_value, float)):
        return 0
    if p_value > level or low <= 0 <= high:
        return 0
    return 1 if low > 0 else -1


def condition_lines(run: Run, result: MetricResult, display: Display) -> tuple[list[str], list[list[str]]]:
    """Titles and a line a model for below the table: averages, on how much they stand, and what the model is."""
    lines = []
    causal = "conditions" in result.tables
    summary = _columns(result.tables.get("summary"))
    for model in run.models:
        label = model.info.label
        averages = next(iter(records(result, "summary", label)), None)
        told = [
            words.MISSING if averages is None else number(averages[name], summary[name], display)
            for name, _ in display.summary
        ]
        base = next(iter(records(result, "conditions", label)), {})
        counts = (
            [base.get("n_texts"), base.get("n_predicted")] if causal else [len(run.texts), model.n_tokens]
        )
        numbers_of = [words.number(count) for count in counts]
        lines.append([words.plain(label), *told, *numbers_of, model.info.positions_summary, model.info.dtype])
    titles = [title for _, title in display.summary]
    tokens = "predicted tokens" if causal else "tokens"
    return ["model", *titles, "texts", tokens, "positions", "dtype"], lines
