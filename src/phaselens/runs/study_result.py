"""Run a study: measure its runs, and hold each published value against the measured one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.errors import InputError, is_list_like
from phaselens.plugin import CellValue, Column, Table, TableSpec
from phaselens.runs.measurement import run as measure
from phaselens.runs.observer import Observer
from phaselens.runs.result import Run
from phaselens.runs.study_file import REASON_SEPARATOR, PublishedValue, Study, StudyRun, require_measurable

NOT_MEASURED = "this model is not measured"
NO_SUCH_LAYER = "the measured model has no such layer"

STUDY_TABLE = TableSpec(
    "study",
    (
        Column("run", str, None, "the run of the study, a protocol"),
        Column("quantity", str, None, "what was published"),
        Column("model", str, None, "the study's label of the model"),
        Column("layer", int, "index", "the layer, 0-based; missing for a value of the whole model"),
        Column("published", float, "as measured", "the published value, in the unit of the column measured"),
        Column("measured", float, "as measured", "what PhaseLens measures"),
        Column("difference", float, "as measured", "measured − published"),
        Column("comparable", str, None, "yes, or no where something differs"),
        Column("why", str, None, "what differs, reasons separated by |"),
        Column("place", str, None, "the table, figure or file that states the published value"),
        Column("column", str, None, "METRIC.TABLE.COLUMN measured"),
    ),
    "One row per published value.",
)


@dataclass(frozen=True)
class StudyResult:
    """The runs of a study by name, and its table: published, measured, difference, comparable or not, and why."""

    study: Study
    runs: Mapping[str, Run]
    table: Table

    @property
    def failed(self) -> list[str]:
        """`RUN: METRIC` of each metric that failed."""
        return [f"{name}: {metric}" for name, run in self.runs.items() for metric in run.failed]

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def run_study(
    study: Study,
    *,
    models: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> StudyResult:
    """Measure the runs of a study and compare them with the published values.

    Args:
        study: a study, from `read_study`.
        models: models to measure in place of the study's, in its order, or as `LABEL=SOURCE`; the study's other models
            are left out. None means the study's own.
        out: a folder for the runs, one directory each; interrupted runs continue there.
        device: as in `phaselens.run`.
        observer: receives the progress.

    Raises:
        InputError: for models or a study that cannot be used.
        ModelError: for a model that cannot be loaded or served.
    """
    require_measurable(study)
    if not is_list_like(models) or not all(isinstance(model, str) for model in models):
        raise InputError("expected models as a list of [LABEL=]SOURCE")
    if out is not None and not isinstance(out, str | os.PathLike):
        raise InputError("expected out as the name of a folder, or None")
    chosen = chosen_models(study, list(models))
    runs = {
        run.name: measure(
            [f"{label}={source}" for label, source in chosen.items()],
            metrics={name: dict(params) for name, params in run.metrics.items()},
            texts=_texts(study, run),
            out=None if out is None else Path(out) / run.name,
            device=device,
            observer=observer,
            **run.options,
        )
        for run in study.runs
    }
    return StudyResult(study, runs, STUDY_TABLE.build(list(_rows(study, chosen, runs))))


def chosen_models(study: Study, models: Sequence[str]) -> dict[str, str]:
    """Return the source of each of the study's models that is measured, by label."""
    own = {model.label: model.source for model in study.models}
    if not models:
        return own
    chosen: dict[str, str] = {}
    labels = iter(own)
    for model in models:
        label, sign, source = model.partition("=")
        if sign and label in own:
            chosen[label] = source
            continue
        free_label = next((label for label in labels if label not in chosen), None)
        if free_label is None:
            raise InputError(
                f"study {study.name!r} has {len(own)} models ({', '.join(own)}); {model!r} is one too many"
            )
        chosen[free_label] = model
    return {label: chosen[label] for label in own if label in chosen}


def _texts(study: Study, run: StudyRun) -> str | list[str]:
    if isinstance(run.texts, tuple):
        return list(run.texts)
    if run.texts == "bundled" or study.folder is None:
        return run.texts
    return str(study.folder / run.texts)


def _rows(study: Study, chosen: Mapping[str, str], runs: Mapping[str, Run]) -> Iterator[tuple[Any, ...]]:
    own = {model.label: model.source for model in study.models}
    differs_of_run = {run.name: run.differs for run in study.runs}
    for value in study.values:
        measured, problem = (None, NOT_MEASURED)
        reasons = [*value.differs, *differs_of_run[value.run]]
        if value.model in chosen:
            measured, problem = measured_value(runs[value.run], value)
            if chosen[value.model] != own[value.model]:
                reasons.insert(0, f"other model: {chosen[value.model]} in place of {own[value.model]}")
        if problem:
            reasons.insert(0, problem)
        yield (
            value.run,
            value.quantity,
            value.model,
            value.layer,
            value.published,
            measured,
            None if measured is None else measured - value.published,
            "no" if reasons else "yes",
            REASON_SEPARATOR.join(reasons),
            value.place,
            f"{value.metric}.{value.table}.{value.column}",
        )


def measured_value(run: Run, value: PublishedValue) -> tuple[float | None, str]:
    """Return what a run measured for a published value, and why it is missing."""
    result = run.metrics[value.metric]
    failures = [failure for failure in result.failures if failure.model == value.model]
    if failures:
        return None, f"{value.metric} failed: {failures[0].message}"
    if value.table not in result.tables:
        return None, f"{value.metric} has no table {value.table}"
    records = [record for record in result.tables[value.table].records() if record["model"] == value.model]
    where: dict[str, CellValue] = dict(value.where or {})
    if value.layer is not None:
        where["layer"] = value.layer
        if records and value.layer not in {record["layer"] for record in records}:
            return None, NO_SUCH_LAYER
    rows = [record for record in records if all(record[name] == cell for name, cell in where.items())]
    numbers = [
        (float(cell), record.get("layer"))
        for record in rows
        if isinstance(cell := record[value.column], int | float)
    ]
    if not numbers:
        return None, "no value was measured"
    return _reduced(numbers, value.reduce)


def _reduced(numbers: Sequence[tuple[float, CellValue]], reduce: str) -> tuple[float | None, str]:
    values = [number for number, _ in numbers]
    if reduce == "mean":
        return sum(values) / len(values), ""
    if reduce in ("min", "max"):
        return (min if reduce == "min" else max)(values), ""
    if reduce in ("argmin", "argmax"):
        _, layer = (min if reduce == "argmin" else max)(numbers, key=lambda pair: pair[0])
        return (float(layer), "") if isinstance(layer, int) else (None, "its rows have no layer")
    if len(values) > 1:
        return None, f"{len(values)} rows fit; a study names one, or says how to reduce them"
    return values[0], ""
