"""Means over the texts of each label, for every metric with values by text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phaselens.errors import InputError, require_kind
from phaselens.plugin import MODEL, Column, Table, TableSpec, interval_help
from phaselens.runs.paired_values import values_by_text
from phaselens.runs.result import LABEL, MetricResult, Run

#: Name of the table that `group_by_label` adds to metrics.
BY_LABEL = "by_label"

_SPEC = TableSpec(
    BY_LABEL,
    (
        MODEL,
        LABEL,
        Column(
            "value", str, None, "the column of the table `texts`; conditions: their loss over the baseline's"
        ),
        Column("unit", str, None, "unit of mean, ci_low and ci_high"),
        Column("condition", str, None, "the condition, for causal metrics"),
        Column("group", str, None, "what else the table distinguishes, such as the tensor"),
        Column("layer", int, "index", "the layer"),
        Column("n_texts", int, "texts", "texts of the label with a value"),
        Column(
            "mean", float, "as unit", "mean over these texts; heads and seeds of a text are averaged first"
        ),
        Column("ci_low", float, "as unit", interval_help("the label's texts")),
        Column("ci_high", float, "as unit", "upper end"),
    ),
    "One row per model, label, value, condition and layer.",
)


def group_by_label(run: Run) -> Run:
    """Return a copy of a run whose metrics also have a table `by_label`: means over the texts of each label.

    A metric without values by text has none.

    Raises:
        InputError: for a run whose texts have no labels.

    >>> import phaselens
    >>> from phaselens.data import Text
    >>> texts = [Text("a", "Call me Ishmael.", "prose"), Text("b", "x = x + 1", "code")]
    >>> run = group_by_label(phaselens.run("rope", metrics=["sinks"], texts=texts))
    >>> {row["label"] for row in run.rows("sinks", "by_label").records()} == {"prose", "code"}
    True
    """
    require_kind("run", run, Run, "made by phaselens.run or phaselens.open_run")
    texts = texts_by_label(run)
    grouped = run.copy()
    for result in grouped.metrics.values():
        if BY_LABEL in result.tables or not result.metric.prints:
            continue
        rows = list(_rows(run, result, texts))
        if rows:
            result.tables[BY_LABEL] = _SPEC.build(rows)
    return grouped


def texts_by_label(run: Run) -> dict[str | None, list[str]]:
    """Return the ids of the texts of each label, in the order of the texts; None has those without a label.

    Raises:
        InputError: for a run whose texts have no labels.
    """
    texts: dict[str | None, list[str]] = {}
    for text in run.texts:
        texts.setdefault(text.label, []).append(text.id)
    if not texts.keys() - {None}:
        raise InputError(
            "the run's texts have no labels to group them by; name the field that holds them (--label-field NAME), or "
            "give Texts with labels"
        )
    return texts


def _rows(run: Run, result: MetricResult, texts: Mapping[str | None, list[str]]) -> Iterator[tuple[Any, ...]]:
    for table in result.tables.values():
        for model in run.models:
            yield from _table_rows(table, model.info.label, texts, run.options.get("seed", 0))


def _table_rows(
    table: Table, model: str, texts: Mapping[str | None, list[str]], seed: int
) -> Iterator[tuple[Any, ...]]:
    import numpy as np

    from phaselens.uncertainty import mean_interval

    for column, by_key in values_by_text(table, model).items():
        for label, ids in texts.items():
            keys = [key for key, values in by_key.items() if any(text in values for text in ids)]
            if not keys:
                continue
            values = np.array([[by_key[key].get(text, np.nan) for key in keys] for text in ids])
            is_present = np.isfinite(values)
            ends = mean_interval(values, present=is_present, seed=seed)
            for index, key in enumerate(keys):
                mean, low, high = (None if end[index] is np.ma.masked else float(end[index]) for end in ends)
                yield (
                    model, label, column.name, column.unit, *key, int(is_present[:, index].sum()), mean, low, high,
                )  # fmt: skip
