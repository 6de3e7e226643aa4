"""Open a run directory: the run as it was measured, without its models, and without importing its plugins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from phaselens.errors import InputError
from phaselens.plugin import (
    MODEL,
    Column,
    LayerView,
    Metric,
    MetricWarning,
    Params,
    ReportSection,
    Table,
    TableSpec,
)
from phaselens.runs.model_description import ModelDescription, from_json
from phaselens.runs.result import FailedShard, Failure, MetricResult, Run, TextRecord, labelled_spec
from phaselens.runs.run_directory import RunDirectory

_CELL_TYPES = {"str": str, "int": int, "float": float}


class StoredParams(Params):
    """Parameters of a metric in a run directory."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "values", dict(values))

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return dict(vars(self)["values"])


class StoredMetric(Metric[StoredParams]):
    """Base of the classes that stand for the metrics of a run directory. They describe tables; they measure nothing."""

    definition = ""
    sections: ClassVar[tuple[ReportSection, ...]] = ()
    #: Whether the metric drew a figure of its own into the run directory.
    has_own_figure: ClassVar[bool] = False

    @classmethod
    def report(cls, tables: Mapping[str, Table], params: StoredParams) -> Sequence[ReportSection]:
        """Return the sections that the run recorded."""
        return cls.sections

    @classmethod
    def define(cls, params: Any) -> str:
        """Return the definition that the run recorded."""
        return cls.definition

    def hooks(self) -> Sequence[str]:
        """Return nothing, because the metric is not measured again."""
        return []

    def update(self, layer: LayerView) -> None:
        """Do nothing."""

    def compute(self) -> Mapping[str, Table]:
        """Return no table."""
        return {}


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a directory that `phaselens run --out` or `phaselens.run(out=…)` completed.

    Raises:
        InputError: for a directory without a run, or whose run is not complete.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected path as the directory of a run, received {type(path).__name__}")
    directory = RunDirectory(path)
    record = directory.read_record()
    if not directory.is_complete:
        raise InputError(
            f"the run in {str(directory.path)!r} is not complete; run its command again to continue: "
            f"{' '.join(record['command'] or ['phaselens.run(…, out=…)'])}"
        )
    result = directory.read_result()
    descriptions = [ModelDescription.from_dict(model) for model in record["models"]]
    texts = [
        TextRecord(
            text["id"], text["sha256"], dict(text["n_tokens"]), _cut(index, descriptions), text["label"]
        )
        for index, text in enumerate(record["texts"])
    ]
    has_labels = any(text.label is not None for text in texts)
    metrics = {
        name: _metric_result(directory, name, stored, result, has_labels=has_labels)
        for name, stored in record["metrics"].items()
    }
    warnings = [MetricWarning(text, code) for text, code in result["warnings"]]
    versions = {name: version for name, version in record["versions"].items() if name != "plugins"}
    models = [description.record for description in descriptions]
    failed_shards = [FailedShard.from_dict(shard) for shard in result.get("failed_shards", [])]
    return Run(
        models,
        texts,
        metrics,
        list(warnings),
        record["options"],
        versions,
        failed_shards=failed_shards,
        directory=directory.path,
    )


def _cut(text_index: int, descriptions: Sequence[ModelDescription]) -> dict[str, bool]:
    return {description.record.info.label: description.cut[text_index] for description in descriptions}


def _metric_result(
    directory: RunDirectory,
    name: str,
    stored: Mapping[str, Any],
    result: Mapping[str, Any],
    *,
    has_labels: bool,
) -> MetricResult:
    specs = tuple(_table_spec(table) for table in stored["tables"])
    attributes = {
        "name": name,
        "version": stored["version"],
        "title": stored["title"],
        "description": stored["description"],
        "citation": stored["citation"],
        "definition": stored["definition"],
        "tables": specs,
        "display": from_json(stored["display"]),
        "figure_panels": from_json(stored["figure_panels"]),
        "prints": stored.get("prints", True),
        "has_own_figure": stored.get("plots", False),
        "sections": tuple(map(from_json, result.get("sections", {}).get(name, []))),
        "__module__": __name__,
    }
    metric = type(f"Stored_{name}", (StoredMetric,), attributes)
    failures = [Failure(**failure) for failure in result["failures"].get(name, [])]
    stored_result = MetricResult(
        metric, StoredParams(stored["params"]), stored["distribution"], failures=failures
    )
    for table_name, not_finite in result["tables"].get(name, {}).items():
        (spec,) = (spec for spec in specs if spec.name == table_name)
        spec = labelled_spec(spec) if has_labels else spec
        rows = directory.read_rows(name, table_name)
        table = Table(TableSpec(table_name, (MODEL, *spec.columns), spec.help), rows, not_finite)
        stored_result.tables[table_name] = table
    return stored_result


def _table_spec(table: Mapping[str, Any]) -> TableSpec:
    columns = (
        Column(column["name"], _CELL_TYPES[column["type"]], column["unit"], column["help"])
        for column in table["columns"]
    )
    return TableSpec(table["name"], tuple(columns), table["help"])
