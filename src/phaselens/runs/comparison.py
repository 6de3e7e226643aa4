"""Compare two models, of one run or of two, text by text: `phaselens.compare`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, is_list_like, require_kind, require_whole, short_form
from phaselens.plugin import Column, Table, TableSpec, interval_help, with_adjusted_p
from phaselens.runs.comparability import (
    Obstacle,
    obstacles_of_cuts,
    obstacles_of_labels,
    obstacles_of_metric,
    obstacles_of_models,
    obstacles_of_options,
    obstacles_of_texts,
    require_comparable,
)
from phaselens.runs.label_groups import texts_by_label
from phaselens.runs.paired_values import PairedKey, ValuesByText, displayed_value, paired_keys, values_by_text
from phaselens.runs.presentation import PresentedComparison
from phaselens.runs.result import LABEL, ModelRecord, Run

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "phaselens.comparison/1"

_FAMILY = "p_value adjusted for the rows of the same value and label"
DIFFERENCES_TABLE = TableSpec(
    "differences",
    (
        Column("metric", str, None, "the metric's name"),
        Column("table", str, None, "the metric's table with a row for each text"),
        Column(
            "value",
            str,
            None,
            "the compared column; conditions are compared by their loss over the baseline's",
        ),
        Column("unit", str, None, "unit of first, second and difference"),
        Column("first_model", str, None, "label of the model whose values are subtracted"),
        Column("second_model", str, None, "label of the model they are subtracted from"),
        Column("condition", str, None, "the condition, for causal metrics"),
        Column("group", str, None, "what else the table distinguishes, such as the tensor"),
        Column("label", str, None, "the label of the texts, with by=label"),
        Column(
            "layer", int, "index", "the layer; missing where the models' conditions have different layers"
        ),
        Column("n_texts", int, "texts", "texts with both values"),
        Column("first", float, "as unit", "mean over texts; heads and seeds of a text are averaged first"),
        Column("second", float, "as unit", "the same for the second model"),
        Column("difference", float, "as unit", "second − first"),
        Column("ci_low", float, "as unit", interval_help(paired=True)),
        Column("ci_high", float, "as unit", "upper end"),
        Column("excludes_zero", int, "0 or 1", "1 if the interval excludes 0"),
        Column("p_value", float, "probability", "two-sided, by sign flips of the texts' differences"),
        Column("d_z", float, "standard deviations", "difference over the sd of the texts' differences"),
        Column("p_holm", float, "probability", f"{_FAMILY}, by Holm's method"),
        Column("p_bh", float, "probability", f"{_FAMILY}, by Benjamini and Hochberg's method"),
    ),
    "One row per metric, value, condition and layer.",
)


@dataclass
class Comparison(PresentedComparison):
    """The differences between two models on the same texts; `print` shows them by metric and layer.

    `displayed` holds the column that is printed of each metric: that of its display, else the first. `allowed`
    describes what else differs between the measurements, and was allowed to, as `NAME: message`. `directories` are
    those of the two runs, None for a run in memory. `renderer` returns the text of `str(comparison)`; without one it
    is one line.
    """

    first: str
    second: str
    differences: Table
    displayed: dict[str, str]
    notes: list[str]
    allowed: list[str]
    directories: tuple[str | None, str | None] = (None, None)
    renderer: Callable[[Comparison], str] | None = field(default=None, repr=False, compare=False)
    html_renderer: Callable[[Comparison], str] | None = field(default=None, repr=False, compare=False)

    @property
    def is_grouped(self) -> bool:
        """Whether the texts of each label were compared by themselves."""
        return any(label is not None for label in self.differences.column(LABEL.name))

    @property
    def titles(self) -> tuple[str, str]:
        """The models' labels; with the runs that they come from where the labels are equal."""
        if self.first != self.second:
            return self.first, self.second
        first, second = (directory and Path(directory).name for directory in self.directories)
        if not first or not second or first == second:
            first, second = "first run", "second run"
        return f"{self.first} ({first})", f"{self.second} ({second})"

    @property
    def n_differences(self) -> int:
        """The number of differences with a p-value."""
        return sum(record["p_value"] is not None for record in self.differences.records())

    def table(self) -> pa.Table:
        """Return the differences as a pyarrow Table."""
        return self.differences.to_arrow()

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values."""
        return {
            "schema": SCHEMA,
            "first": self.first,
            "second": self.second,
            "directories": list(self.directories),
            "differences": self.differences.as_dict(),
            "n_differences": self.n_differences,
            "notes": list(self.notes),
            "allowed": list(self.allowed),
        }

    def __str__(self) -> str:
        if self.renderer is not None:
            return self.renderer(self)
        return f"{self.second} − {self.first}: {len(self.differences.rows)} differences"


def compare(
    first: Run,
    second: Run | None = None,
    *,
    models: Sequence[str] | None = None,
    allow: Collection[str] = (),
    seed: int = 0,
    by: str | None = None,
) -> Comparison:
    """Compare two models text by text, metric by metric and layer by layer.

    Args:
        first: a run.
        second: another run on the same texts; None to compare two models of `first`.
        models: labels of the two models, the first one's from `first`. By default the only model of each run, the
            model that both runs have, or the two models of a run of two.
        allow: names of `phaselens.runs.DIFFERENCES` that are accepted although they make numbers incomparable.
        seed: seed of intervals and permutations.
        by: "label" to compare the texts of each label by themselves; None for all texts.

    Raises:
        InputError: for runs without common metrics or texts, or that differ in more than `allow` names.

    >>> import phaselens
    >>> run = phaselens.run(metrics=["sinks"], texts=["Call me Ishmael.", "It was a dark night."])
    >>> comparison = phaselens.compare(run)
    >>> scores = [row for row in comparison.differences.records() if row["value"] == "score"]
    >>> comparison.first, comparison.second, [row["layer"] for row in scores]
    ('rope', 'drope', [0, 1, 2, 3, 4, 5])
    """
    require_kind("first", first, Run, "made by phaselens.run or phaselens.open_run")
    if second is not None:
        require_kind("second", second, Run, "made by phaselens.run or phaselens.open_run")
    require_whole("seed", seed, 0)
    if by not in (None, LABEL.name):
        raise InputError(f"by is {short_form(by)}; give 'label', or None")
    second_run = first if second is None else second
    first_model, second_model = _models(first, second, models)
    metrics = [name for name in _compared(first) if name in second_run.metrics]
    if not metrics:
        raise InputError(
            f"the runs have no metric in common: {', '.join(first.metrics)} and {', '.join(second_run.metrics)}"
        )
    obstacles = list(_obstacles((first, second_run), (first_model, second_model), metrics))
    if by is not None:
        obstacles += obstacles_of_labels(first, second_run)
    allowed = require_comparable(obstacles, allow)
    notes: list[str] = []
    left_out = [name for name in [*_compared(first), *_compared(second_run)] if name not in metrics]
    if left_out:
        notes.append(f"in one run only: {', '.join(left_out)}")
    rows: list[tuple[Any, ...]] = []
    labels = first_model.info.label, second_model.info.label
    common_texts = _common_texts(first, second_run)
    groups = None if by is None else _by_label(first, common_texts)
    pairing = _Pairing((first, second_run), labels, common_texts, groups, seed, notes)
    for name in metrics:
        rows += pairing.rows(name)
    if not rows:
        raise InputError(f"the metrics {', '.join(metrics)} have no table with a row for each text")
    differences = DIFFERENCES_TABLE.build(rows)
    directories = _directory(first), _directory(second_run)
    return Comparison(*labels, differences, _displayed(differences, first), notes, allowed, directories)


def _compared(run: Run) -> list[str]:
    """Return the names of the metrics that measure something, rather than only supply details to reports."""
    return [name for name, result in run.metrics.items() if result.metric.prints]


def _directory(run: Run) -> str | None:
    return None if run.directory is None else str(run.directory)


def _models(first: Run, second: Run | None, labels: Sequence[str] | None) -> tuple[ModelRecord, ModelRecord]:
    """Return the two models to compare."""
    runs = [first, first if second is None else second]
    if labels is not None:
        chosen = list(labels) if is_list_like(labels) else []
        if len(chosen) != 2:
            raise InputError(f"expected models as two labels, received {short_form(labels)}")
        return _model(runs[0], chosen[0]), _model(runs[1], chosen[1])
    names = [[model.info.label for model in run.models] for run in runs]
    if second is None:
        if len(names[0]) == 2:
            return first.models[0], first.models[1]
        raise InputError(
            f"the run has {len(names[0])} models ({', '.join(names[0])}); name two of them, or give two runs"
        )
    common = [label for label in names[0] if label in names[1]]
    if len(common) == 1:
        return _model(runs[0], common[0]), _model(runs[1], common[0])
    if not common and len(names[0]) == len(names[1]) == 1:
        return runs[0].models[0], runs[1].models[0]
    raise InputError(
        f"the runs have the models {', '.join(names[0])} and {', '.join(names[1])}; name one of each (--models)"
    )


def _model(run: Run, label: str) -> ModelRecord:
    records = {model.info.label: model for model in run.models}
    if label not in records:
        raise InputError(f"the run has no model {label!r}; {close_matches(str(label), records)}")
    return records[label]


def _obstacles(
    runs: tuple[Run, Run], models: tuple[ModelRecord, ModelRecord], metrics: Sequence[str]
) -> Iterator[Obstacle]:
    yield from obstacles_of_models(*models)
    yield from obstacles_of_cuts(runs, (models[0].info.label, models[1].info.label))
    if runs[0] is runs[1]:
        return
    yield from obstacles_of_texts(*runs)
    yield from obstacles_of_options(*runs)
    for name in metrics:
        yield from obstacles_of_metric(name, runs[0].metrics[name], runs[1].metrics[name])


def _common_texts(first: Run, second: Run) -> list[str]:
    """Return the ids of the texts that both runs have with the same content, in the first run's order."""
    contents = {text.id: text.sha256 for text in second.texts}
    ids = [text.id for text in first.texts if contents.get(text.id) == text.sha256]
    if not ids:
        raise InputError("the runs have no text in common; measure both on the same texts")
    return ids


def _by_label(run: Run, texts: Sequence[str]) -> dict[str | None, list[str]]:
    """Return the ids among `texts` of each label of the run's texts."""
    common = set(texts)
    by_label = {label: [text for text in ids if text in common] for label, ids in texts_by_label(run).items()}
    return {label: ids for label, ids in by_label.items() if ids}


#: Index of p in the rows of one value and label, which are a family of tests.
_P_OF_GROUP = 10


@dataclass(frozen=True)
class _Pairing:
    """Two runs, a model of each, and the ids of the texts that both have; `groups` has them by label."""

    runs: tuple[Run, Run]
    labels: tuple[str, str]
    texts: Sequence[str]
    groups: Mapping[str | None, Sequence[str]] | None
    seed: int
    notes: list[str]

    def rows(self, metric: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of one metric; layers that differ are noted."""
        first, second = (run.metrics[metric].tables for run in self.runs)
        for name in (name for name in first if name in second):
            values = values_by_text(first[name], self.labels[0]), values_by_text(second[name], self.labels[1])
            for column in (column for column in values[0] if column in values[1]):
                yield from self._column_rows(metric, name, column, values[0][column], values[1][column])

    def _column_rows(
        self, metric: str, table: str, column: Column, first: ValuesByText, second: ValuesByText
    ) -> Iterator[tuple[Any, ...]]:
        pairs = paired_keys(first, second)
        if self.groups is None:
            groups: Mapping[str | None, Sequence[str]] = {None: self._texts_of(first, second)}
        else:  # prompts that a metric makes itself have no label
            groups = self.groups
        for label, texts in groups.items():
            if pairs and texts:
                rows = list(self._group_rows(metric, pairs, texts, first, second))
                for row in with_adjusted_p(rows, _P_OF_GROUP):
                    yield (metric, table, column.name, column.unit, *self.labels, *row[:2], label, *row[2:])

    def _group_rows(
        self,
        metric: str,
        pairs: Sequence[PairedKey],
        texts: Sequence[str],
        first: ValuesByText,
        second: ValuesByText,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield condition, group, layer and statistics of each pair of keys, over some texts."""
        import numpy as np

        from phaselens.uncertainty import compare_paired

        values = [
            np.array([[by_text.get(text, np.nan) for by_text in columns] for text in texts])
            for columns in ([first[pair.first] for pair in pairs], [second[pair.second] for pair in pairs])
        ]
        for pair, result in zip(pairs, compare_paired(*values, seed=self.seed), strict=True):
            if not result.n_texts:
                continue
            note = pair.note(metric, self.labels)
            if note and note not in self.notes:
                self.notes.append(note)
            excludes_zero = None
            if result.ci_low is not None and result.ci_high is not None:
                excludes_zero = int(result.ci_low > 0 or result.ci_high < 0)
            yield (
                pair.condition, pair.group, pair.layer, result.n_texts, result.first, result.second, result.difference,
                result.ci_low, result.ci_high, excludes_zero, result.p_value, result.d_z,
            )  # fmt: skip

    def _texts_of(self, first: ValuesByText, second: ValuesByText) -> list[str]:
        """Return the ids of the texts with values in both, and after them the prompts that the metric made itself."""
        ids, other_ids = (
            dict.fromkeys(text for by_text in values.values() for text in by_text)
            for values in (first, second)
        )
        from_run = [text for text in self.texts if text in ids and text in other_ids]
        run_ids = {text.id for run in self.runs for text in run.texts}
        return [*from_run, *(text for text in ids if text in other_ids and text not in run_ids)]


def _displayed(differences: Table, run: Run) -> dict[str, str]:
    """Return the column to print of each metric: what it costs under conditions, its display's value, or the first."""
    displayed: dict[str, str] = {}
    for name, result in run.metrics.items():
        columns = list(dict.fromkeys(str(r["value"]) for r in differences.records() if r["metric"] == name))
        if columns:
            displayed[name] = displayed_value(result, columns)
    return displayed
