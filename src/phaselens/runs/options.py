"""What a run is asked for: models, options, metrics; checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phaselens.data import BOS_POLICIES
from phaselens.errors import InputError, close_matches
from phaselens.plugin import Metric, Params, plugins, require_metric

POSITIONS = ("auto", "nope")
DEFAULT_MODELS = ("rope", "drope")

_LABEL = re.compile(r"(?P<label>[\w.+-]+)=(?P<source>.*)", re.DOTALL)


@dataclass(frozen=True)
class ModelSpec:
    """`[LABEL=]SOURCE[@REVISION]`, taken apart."""

    source: str
    label: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """The parts of `text`. What exists as a path is taken as one, whatever signs it contains.

        >>> ModelSpec.parse("base=org/model@v1.0")
        ModelSpec(source='org/model', label='base', revision='v1.0')
        """
        label, source, revision = None, text, None
        named = None if Path(source).exists() else _LABEL.fullmatch(source)
        if named:
            label, source = named["label"], named["source"]
        if "@" in source and not Path(source).exists():
            source, _, revision = source.partition("@")
            if Path(source).is_dir():
                raise InputError(f"model {text!r}: a folder has no revisions; leave {'@' + revision!r} out")
            if not revision:
                raise InputError(f"model {text!r}: nothing follows the @; write SOURCE@REVISION or SOURCE")
        if not source:
            raise InputError(f"model {text!r} names no source; write [LABEL=]SOURCE[@REVISION]")
        return cls(source, label, revision)

    @property
    def short(self) -> str:
        """The label where none was given: the last part of the source."""
        return self.label or Path(self.source).name or self.source


def distinct_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """A label for each model: its own, else the short name, else (where two are alike) the whole source."""
    short = [spec.short for spec in specs]
    labels = [
        name if short.count(name) == 1 or spec.label else spec.source
        for name, spec in zip(short, specs, strict=True)
    ]
    require_distinct(labels)
    return labels


def require_distinct(labels: Sequence[str]) -> None:
    """InputError if two models have one label."""
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two models are labelled {label!r}; name them apart: LABEL=SOURCE")


@dataclass(frozen=True)
class Options:
    """Everything of a run but its models, metrics and texts. `bos` None: each lens' own policy."""

    max_tokens: int = 512
    n_texts: int | None = None
    batch_tokens: int = 8192
    bos: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    positions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n_texts", "batch_tokens"):
            value = getattr(self, name)
            if name == "n_texts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; give a whole number of at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; give a whole number of at least 0")
        if self.bos is not None and self.bos not in BOS_POLICIES:
            raise InputError(f"bos is {self.bos!r}; {close_matches(str(self.bos), BOS_POLICIES)}")
        for label, choice in self.positions.items():
            if choice not in POSITIONS:
                raise InputError(f"positions of {label!r}: {choice!r}; {close_matches(choice, POSITIONS)}")

    def require_labels(self, labels: Sequence[str]) -> None:
        """InputError if `positions` speaks of a model that is not there."""
        for label in self.positions:
            if label not in labels:
                raise InputError(f"positions: no model is labelled {label!r}; {close_matches(label, labels)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"positions": dict(self.positions)}


@dataclass(frozen=True)
class Chosen:
    """A metric that a run will use, with its parameters and the distribution it comes from."""

    metric: type[Metric[Any]]
    params: Params
    distribution: str

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.metric.name


MetricRequest = str | type[Metric[Any]] | tuple[str | type[Metric[Any]], Mapping[str, Any]]


def choose(requests: MetricRequest | Iterable[MetricRequest]) -> list[Chosen]:
    """Metrics from what a caller gave: a name, a class, or a pair of one of them and its parameters."""
    if isinstance(requests, str | type | tuple):
        requests = [requests]
    chosen: list[Chosen] = []
    for request in requests:
        asked, values = request if isinstance(request, tuple) else (request, {})
        one = _chosen(asked, values)
        if one.name in [other.name for other in chosen]:
            raise InputError(f"metric {one.name!r} is asked for twice; make two runs to compare parameters")
        chosen.append(one)
    if not chosen:
        raise InputError(f"no metric was asked for; {close_matches('', plugins().names)}")
    return chosen


def _chosen(asked: str | type[Metric[Any]], values: Mapping[str, Any]) -> Chosen:
    if isinstance(asked, str):
        metric = plugins().metric(asked)
        origin = plugins().origin(asked)
        distribution = f"{origin.distribution} {origin.version}"
    else:
        try:
            metric = require_metric(asked, "metrics")
        except TypeError as error:
            raise InputError(str(error)) from error
        distribution = f"module {metric.__module__}"
    try:
        params = metric.Params.parse(values)
    except InputError as error:
        raise InputError(f"{metric.name}: {error}") from error
    return Chosen(metric, params, distribution)
