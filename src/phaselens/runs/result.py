"""What a run found: models, texts, tables, failures and warnings, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from phaselens.errors import InputError, close_matches
from phaselens.plugin import MODEL, Metric, ModelInfo, Params, Table, TableSpec
from phaselens.plugin.loading import FAULTS, told

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "phaselens.run/1"


@dataclass(frozen=True)
class TextRecord:
    """A text as the run measured it; `n_tokens` and `cut` are by model label."""

    id: str
    sha256: str
    n_tokens: dict[str, int] = field(default_factory=dict)
    cut: dict[str, bool] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `n_tokens` is the first model's."""
        return {
            "id": self.id,
            "n_tokens": next(iter(self.n_tokens.values())),
            "sha256": self.sha256,
            "n_tokens_by_model": dict(self.n_tokens),
            "truncated": any(self.cut.values()),
        }


@dataclass(frozen=True)
class ModelRecord:
    """A model as the run met it. `first_token_id` is None where texts begin with different tokens."""

    info: ModelInfo
    bos: str
    first_token_id: int | None
    starts_with_bos: bool
    n_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: the model's facts, and how texts began."""
        return self.info.as_dict() | {
            "bos": self.bos,
            "first_token_id": self.first_token_id,
            "starts_with_bos": self.starts_with_bos,
            "n_tokens": self.n_tokens,
        }


@dataclass(frozen=True)
class Failure:
    """Where a metric failed, and at what."""

    model: str
    stage: str
    type: str
    message: str
    traceback: str
    #: `file:line` in the file of the metric's author.
    where: str | None = None

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.type} in {self.stage} on {self.model}: {self.message}{place}"

    def as_dict(self) -> dict[str, str | None]:
        """Plain JSON values."""
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
        """Plain JSON values."""
        return {"model": self.model, "type": self.type, "message": self.message}


@dataclass
class MetricResult:
    """One metric's tables, models one below the other. A failed one keeps the tables of models it served."""

    metric: type[Metric[Any]]
    params: Params
    distribution: str
    tables: dict[str, Table] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def status(self) -> Literal["ok", "failed"]:
        """`ok`, or `failed` if it failed on any model."""
        return "failed" if self.failures else "ok"

    @property
    def definition(self) -> str:
        """Which definition the parameters chose, in one line."""
        try:
            return self.metric.define(self.params)
        except FAULTS as error:  # a run calls it first where a failure is recorded
            return f"its define failed: {told(error)}"

    def add(self, label: str, name: str, found: Table, text_order: dict[str, int]) -> None:
        """Put one model's table under those of the models before it, in the order of the texts."""
        spec = found.spec
        rows = found.rows
        columns = [column.name for column in spec.columns]
        if "text" in columns:
            at = columns.index("text")
            # What is not a text of the run (a prompt of the metric's own) keeps its place, after the texts.
            last = len(text_order)
            rows = sorted(rows, key=lambda row: text_order.get(str(row[at]), last))
        if name not in self.tables:
            self.tables[name] = Table(TableSpec(name, (MODEL, *spec.columns), spec.help))
        self.tables[name].rows.extend((label, *row) for row in rows)

    def keep_models(self, labels: Collection[str]) -> None:
        """Drop the rows and failures of all other models."""
        self.failures = [failure for failure in self.failures if failure.model in labels]
        for name, table in list(self.tables.items()):
            kept = [row for row in table.rows if row[0] in labels]
            if table.rows and not kept:
                del self.tables[name]
            table.rows = kept

    def apart(self) -> MetricResult:
        """The same result in lists of its own; cells and parameters cannot be changed."""
        tables = {
            name: replace(table, rows=list(table.rows), not_finite=dict(table.not_finite))
            for name, table in self.tables.items()
        }
        return replace(self, tables=tables, failures=list(self.failures))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
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
class Run:
    """The result of `phaselens.run`. `print(run)` shows it; `run.table("sinks", "layers")` is a pyarrow
    Table."""

    models: list[ModelRecord]
    texts: list[TextRecord]
    metrics: dict[str, MetricResult]
    warnings: list[str]
    options: dict[str, Any]
    versions: dict[str, str]
    #: Models that were asked for and not measured; a run that ended early is the `run` of its exception.
    errors: list[ModelFailure] = field(default_factory=list)

    #: Turns a run into text. The report storey, which lies above this one, puts it here when it is imported.
    renderer: ClassVar[Callable[[Run], str] | None] = None

    @property
    def failed(self) -> list[str]:
        """Names of the metrics that failed on some model."""
        return [name for name, result in self.metrics.items() if result.status == "failed"]

    def apart(self) -> Run:
        """The same run for another reader: what one of them changes does not reach the other."""
        return replace(
            self,
            models=list(self.models),
            texts=[replace(text, n_tokens=dict(text.n_tokens), cut=dict(text.cut)) for text in self.texts],
            metrics={name: result.apart() for name, result in self.metrics.items()},
            warnings=list(self.warnings),
            options=deepcopy(self.options),
            versions=dict(self.versions),
            errors=list(self.errors),
        )

    def end_early(self, error: BaseException, labels: Sequence[str]) -> None:
        """Keep what is complete, and say why the other models of `labels` are not in it."""
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
        self.warnings.extend(str(failure) for failure in self.errors)

    def result(self, metric: str) -> MetricResult:
        """One metric's result; InputError with close matches for another name."""
        if metric not in self.metrics:
            raise InputError(f"the run has no metric {metric!r}; {close_matches(metric, self.metrics)}")
        return self.metrics[metric]

    def rows(self, metric: str, name: str) -> Table:
        """A result table as plain rows; InputError with close matches for another name."""
        tables = self.result(metric).tables
        if name not in tables:
            raise InputError(f"metric {metric!r} has no table {name!r}; {close_matches(name, tables)}")
        return tables[name]

    def table(self, metric: str, name: str) -> pa.Table:
        """A result table as a pyarrow Table, for instance `run.table("sinks", "layers")`."""
        return self.rows(metric, name).to_arrow()

    def to_dict(self) -> dict[str, Any]:
        """The whole run as plain JSON values, as `--format json` prints it; no number in it is NaN."""
        return {
            "schema": SCHEMA,
            "models": [model.as_dict() for model in self.models],
            "texts": [text.as_dict() for text in self.texts],
            "metrics": {name: result.as_dict() for name, result in self.metrics.items()},
            "warnings": list(self.warnings),
            "seed": self.options["seed"],
            "options": dict(self.options),
            "versions": dict(self.versions),
            # Only where the run ended early, so that nobody takes a part for the whole.
            **({"errors": [failure.as_dict() for failure in self.errors]} if self.errors else {}),
        }

    def __str__(self) -> str:
        renderer = Run.renderer
        return renderer(self) if renderer else repr(self)

    def __repr__(self) -> str:
        models = ", ".join(model.info.label for model in self.models)
        return f"<Run of {', '.join(self.metrics)} on {models}, {len(self.texts)} texts>"
