"""The result of a run: models, texts, tables, failures and warnings, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phaselens.errors import InputError, close_matches, require_text
from phaselens.plugin import MODEL, Column, Metric, ModelInfo, Params, Table, TableSpec
from phaselens.plugin.author_errors import describe_error, is_of_plugin
from phaselens.plugin.return_checks import require_definition
from phaselens.runs.presentation import PresentedResult, PresentedRun, Presenter

if TYPE_CHECKING:
    import pyarrow as pa

#: Version of the JSON that a run is written as; another number is another format.
SCHEMA = "phaselens.run/1"
#: The column that a run puts after the ids of texts, if texts have labels.
LABEL = Column("label", str, None, "the text's label")


@dataclass(frozen=True)
class TextRecord:
    """A text of the run; `n_tokens` and `cut` are by model label, `label` groups texts."""

    id: str
    sha256: str
    n_tokens: dict[str, int] = field(default_factory=dict)
    cut: dict[str, bool] = field(default_factory=dict)
    label: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values; `n_tokens` is that of the first model."""
        label = {} if self.label is None else {"label": self.label}
        return label | {
            "id": self.id,
            "n_tokens": next(iter(self.n_tokens.values())),
            "sha256": self.sha256,
            "n_tokens_by_model": dict(self.n_tokens),
            "truncated": any(self.cut.values()),
        }


@dataclass(frozen=True)
class ModelRecord:
    """A model of the run. `first_token_id` is None where texts begin with different tokens."""

    info: ModelInfo
    bos: str
    first_token_id: int | None
    starts_with_bos: bool
    n_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the model's facts, and how its texts begin, as plain JSON values."""
        return self.info.as_dict() | {
            "bos": self.bos,
            "first_token_id": self.first_token_id,
            "starts_with_bos": self.starts_with_bos,
            "n_tokens": self.n_tokens,
        }


@dataclass(frozen=True)
class Failure:
    """The failure of a metric on one model."""

    model: str
    stage: str
    type: str
    message: str
    traceback: str
    #: `file:line` in the metric's own file; None if the error arose elsewhere or was raised on purpose.
    where: str | None = None

    def __str__(self) -> str:
        location = f" ({self.where})" if self.where else ""
        return f"{self.type} in {self.stage} on {self.model}: {self.message}{location}"

    def as_dict(self) -> dict[str, str | None]:
        """Return the failure as plain JSON values."""
        return {
            "model": self.model,
            "stage": self.stage,
            "type": self.type,
            "message": self.message,
            "traceback": self.traceback,
            "where": self.where,
        }


@dataclass(frozen=True)
class ModelFailure:
    """Why a model was not measured."""

    model: str
    type: str
    message: str

    def __str__(self) -> str:
        return f"{self.model}: not measured: {self.message}"

    def as_dict(self) -> dict[str, str]:
        """Return the failure as plain JSON values."""
        return {"model": self.model, "type": self.type, "message": self.message}


@dataclass(frozen=True)
class FailedShard:
    """A shard that could not be computed.

    Attributes:
        model: the model's label.
        phase: `observations` or `conditions`.
        shard: the number of the shard.
        texts: ids of its texts; empty for the prompts or sequences of a metric.
        reason: what happened each time.
        texts_of: the metric whose prompts or sequences the shard has; empty for the run's texts.
    """

    model: str
    phase: str
    shard: int
    texts: tuple[str, ...]
    reason: str
    texts_of: str = ""

    @property
    def name(self) -> tuple[str, str, int]:
        """What names the shard among those of its model."""
        return self.phase, self.texts_of, self.shard

    def __str__(self) -> str:
        owner = f" of the prompts of {self.texts_of}" if self.texts_of else ""
        named = ", ".join(map(repr, self.texts[:5])) + (", …" if len(self.texts) > 5 else "")
        texts = f"; {len(self.texts)} texts are missing: {named}" if self.texts else ""
        return (
            f"{self.model}: shard {self.shard}{owner} ({self.phase}) was not computed: {self.reason}{texts}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the shard as plain JSON values."""
        return {
            "model": self.model,
            "phase": self.phase,
            "shard": self.shard,
            "texts": list(self.texts),
            "reason": self.reason,
            "texts_of": self.texts_of,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FailedShard:
        """Return the shard that `as_dict` returned."""
        return cls(**{**values, "texts": tuple(values["texts"])})


class NotMeasured(str):
    """The warning that a model was not measured; a type, so that the command line can leave out its own error."""

    __slots__ = ()


def labelled_spec(spec: TableSpec) -> TableSpec:
    """Return a table's columns with that of the labels; the same where the table has no texts, or a `label` itself."""
    names = [column.name for column in spec.columns]
    if "text" not in names or LABEL.name in names:
        return spec
    position = names.index("text") + 1
    return replace(spec, columns=(*spec.columns[:position], LABEL, *spec.columns[position:]))


@dataclass(repr=False)
class MetricResult(PresentedResult):
    """The tables of one metric for all models, `result["layers"]`. A failed metric keeps the tables of the models that
    it measured."""

    metric: type[Metric[Any]]
    params: Params
    distribution: str
    tables: dict[str, Table] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def status(self) -> Literal["ok", "failed"]:
        """`ok`, or `failed` if the metric failed on any model."""
        return "failed" if self.failures else "ok"

    @property
    def definition(self) -> str:
        """One line that describes the definition chosen by the parameters."""
        try:
            require_definition(self.metric, self.params)
            return self.metric.define(self.params)
        except BaseException as error:  # a run has already recorded the failure
            if not is_of_plugin(error):
                raise
            return f"its define failed: {describe_error(error)}"

    def add(
        self,
        label: str,
        name: str,
        table: Table,
        text_order: dict[str, int],
        text_labels: Mapping[str, str] | None = None,
    ) -> None:
        """Append one model's table, sorted in the order of the texts, with a column of their labels if any has one."""
        spec = labelled_spec(table.spec) if text_labels else table.spec
        rows = table.rows
        if spec is not table.spec:
            position = [column.name for column in table.spec.columns].index("text")
            rows = [
                (*row[: position + 1], (text_labels or {}).get(str(row[position])), *row[position + 1 :])
                for row in rows
            ]
        columns = [column.name for column in spec.columns]
        if "text" in columns:
            text_column = columns.index("text")
            # Rows of a metric's own prompts follow the texts, in their own order.
            after_texts = len(text_order)
            rows = sorted(rows, key=lambda row: text_order.get(str(row[text_column]), after_texts))
        if name not in self.tables:
            self.tables[name] = Table(TableSpec(name, (MODEL, *spec.columns), spec.help))
        self.tables[name].rows.extend((label, *row) for row in rows)

    def keep_models(self, labels: Collection[str]) -> None:
        """Drop the rows and failures of all other models."""
        self.failures = [failure for failure in self.failures if failure.model in labels]
        for name, table in list(self.tables.items()):
            rows = [row for row in table.rows if row[0] in labels]
            if table.rows and not rows:
                del self.tables[name]
            table.rows = rows

    def copy(self) -> MetricResult:
        """Return a copy with its own lists; cells and parameters are immutable."""
        tables = {
            name: replace(table, rows=list(table.rows), not_finite=dict(table.not_finite))
            for name, table in self.tables.items()
        }
        return replace(self, tables=tables, failures=list(self.failures))

    def as_dict(self) -> dict[str, Any]:
        """Return the metric's definition, parameters, tables and failures as plain JSON values."""
        return {
            "version": self.metric.version,
            "status": self.status,
            "distribution": self.distribution,
            "definition": self.definition,
            "params": self.params.as_dict(),
            "tables": {name: table.as_dict() for name, table in self.tables.items()},
            "errors": [failure.as_dict() for failure in self.failures],
        }


@dataclass
class Run(PresentedRun):
    """The result of `phaselens.run`.

    `print(run)` shows its tables; `run["sinks"]` is a metric's result, `run["sinks"]["layers"]` its table as plain
    rows, and `run.table("sinks", "layers")` a pyarrow Table. `"sinks" in run` and iteration are by metric.

    `renderer` returns the text of `str(run)`. `phaselens.run` sets it to the tables of `phaselens.report`; without one,
    it is one line per metric.
    """

    models: list[ModelRecord]
    texts: list[TextRecord]
    metrics: dict[str, MetricResult]
    warnings: list[str]
    options: dict[str, Any]
    versions: dict[str, str]
    #: Requested models that were not measured. A run that ended early is the `run` attribute of its exception.
    errors: list[ModelFailure] = field(default_factory=list)
    renderer: Callable[[Run], str] | None = field(default=None, repr=False, compare=False)
    presenter: Presenter | None = field(default=None, repr=False, compare=False)
    #: Shards that could not be computed; the tables lack their texts.
    failed_shards: list[FailedShard] = field(default_factory=list)
    #: The directory that holds the run; None for one that is only in memory.
    directory: Path | None = field(default=None, compare=False)

    @property
    def failed(self) -> list[str]:
        """Names of the metrics that failed on some model."""
        return [name for name, result in self.metrics.items() if result.status == "failed"]

    def copy(self) -> Run:
        """Return a copy for another reader; changes to it do not affect the run."""
        return replace(
            self,
            models=list(self.models),
            texts=[replace(text, n_tokens=dict(text.n_tokens), cut=dict(text.cut)) for text in self.texts],
            metrics={name: result.copy() for name, result in self.metrics.items()},
            warnings=list(self.warnings),
            options=deepcopy(self.options),
            versions=dict(self.versions),
            errors=list(self.errors),
            failed_shards=list(self.failed_shards),
        )

    def add_model(
        self,
        model: ModelRecord,
        n_tokens: Sequence[int],
        cut: Sequence[bool],
        tables: Mapping[str, Mapping[str, Table]],
        warnings: Iterable[str],
    ) -> None:
        """Add what was measured on a model: its facts, its tokens by text, its tables by metric, and its warnings."""
        label = model.info.label
        text_order = {text.id: index for index, text in enumerate(self.texts)}
        text_labels = {text.id: text.label for text in self.texts if text.label is not None}
        for metric_name, metric_tables in tables.items():
            for table_name, table in metric_tables.items():
                self.metrics[metric_name].add(label, table_name, table, text_order, text_labels)
        for record, n_tokens_of_text, is_cut in zip(self.texts, n_tokens, cut, strict=True):
            record.n_tokens[label], record.cut[label] = n_tokens_of_text, is_cut
        self.models.append(model)
        self.warnings.extend(warnings)

    def end_early(self, error: BaseException, labels: Sequence[str]) -> None:
        """Keep the finished models, and record why the other models of `labels` are missing."""
        finished = {model.info.label for model in self.models}
        for result in self.metrics.values():
            result.keep_models(finished)
        for text in self.texts:
            for by_model in (text.n_tokens, text.cut):
                for label in by_model.keys() - finished:
                    del by_model[label]
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
        for label in labels:
            if label not in finished:
                self.errors.append(ModelFailure(label, type(error).__name__, reason or type(error).__name__))
                reason = "the run ended before it"
        self.warnings.extend(NotMeasured(failure) for failure in self.errors)

    def result(self, metric: str) -> MetricResult:
        """Return one metric's result; raise InputError with close matches for another name."""
        require_text("metric", metric)
        if metric not in self.metrics:
            raise InputError(f"the run has no metric {metric!r}; {close_matches(metric, self.metrics)}")
        return self.metrics[metric]

    def rows(self, metric: str, name: str) -> Table:
        """Return a result table as plain rows; raise InputError with close matches for another name."""
        return self.result(metric)[name]

    def table(self, metric: str, name: str) -> pa.Table:
        """Return a result table as a pyarrow Table, for instance `run.table("sinks", "layers")`."""
        return self.rows(metric, name).to_arrow()

    def to_dict(self) -> dict[str, Any]:
        """Return the run as the JSON values that `--format json` prints, without NaN."""
        return {
            "schema": SCHEMA,
            "models": [model.as_dict() for model in self.models],
            "texts": [text.as_dict() for text in self.texts],
            "metrics": {name: result.as_dict() for name, result in self.metrics.items()},
            "warnings": list(self.warnings),
            "seed": self.options["seed"],
            "options": dict(self.options),
            "versions": dict(self.versions),
            # Present only where the run ended early, so that it is not mistaken for a complete one.
            **({"errors": [failure.as_dict() for failure in self.errors]} if self.errors else {}),
            **(
                {"failed_shards": [shard.as_dict() for shard in self.failed_shards]}
                if self.failed_shards
                else {}
            ),
        }

    def __str__(self) -> str:
        return self._summary() if self.renderer is None else self.renderer(self)

    def _summary(self) -> str:
        """Return one line per metric: its models, the number of texts, and its failures."""
        models = ", ".join(model.info.label for model in self.models) or "no model"
        lines = []
        for name, result in self.metrics.items():
            failures = "".join(f"; failed: {failure}" for failure in result.failures)
            lines.append(" ".join(f"{name}: {models}; texts: {len(self.texts):,}{failures}".split()))
        return "\n".join(lines)

    def __repr__(self) -> str:
        models = ", ".join(model.info.label for model in self.models)
        return f"<Run of {', '.join(self.metrics)} on {models}, {len(self.texts)} texts>"
