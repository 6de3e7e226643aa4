"""What a run is asked for: models, options, metrics; checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phaselens.data.tokens import require_bos
from phaselens.errors import InputError, close_matches, require_text
from phaselens.plugin import Metric, ModelInfo, Params, plugins, require_metric
from phaselens.plugin.mistakes import kind_of

POSITIONS = ("auto", "nope")
DEFAULT_MODELS = ("rope", "drope")

_LABEL = re.compile(r"(?P<label>[\w.+-]+)=(?P<source>.*)", re.DOTALL)


@dataclass(frozen=True)
class ModelSpec:
    """`[LABEL=]SOURCE[@REVISION]`, taken apart."""

    source: str
    label: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        require_text("source", self.source)
        for name, value in (("label", self.label), ("revision", self.revision)):
            if value is not None:
                require_text(name, value)

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """The parts of `text`. What exists as a path is taken as one, whatever signs it contains.

        >>> ModelSpec.parse("base=org/model@v1.0")
        ModelSpec(source='org/model', label='base', revision='v1.0')
        """
        require_text("a model's name", text)
        label, source, revision = None, text, None
        named = None if Path(source).exists() else _LABEL.fullmatch(source)
        if named:
            label, source = named["label"], named["source"]
        if "@" in source and not Path(source).exists():
            source, _, revision = source.partition("@")
            if source and Path(source).is_dir():
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
        for name, least in (("max_tokens", 1), ("n_texts", 1), ("batch_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "n_texts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")
        for name in ("bos", "device", "dtype"):
            if not isinstance(getattr(self, name), str) and not (name == "bos" and self.bos is None):
                raise InputError(f"{name} is {kind_of(getattr(self, name))}; give text")
        if self.bos is not None:
            require_bos(self.bos)
        if not isinstance(self.positions, Mapping):
            raise InputError(
                f"positions is {kind_of(self.positions)}; give a dict from labels to {' or '.join(POSITIONS)}, such as "
                "{'rope': 'nope'}"
            )
        for label, choice in self.positions.items():
            if choice not in POSITIONS:
                raise InputError(
                    f"positions of {label!r}: {choice!r}; {close_matches(str(choice), POSITIONS)}"
                )

    def require_labels(self, labels: Sequence[str]) -> None:
        """InputError if `positions` speaks of a model that is not there."""
        for label in self.positions:
            if label not in labels:
                raise InputError(
                    f"positions: no model is labelled {label!r}; {close_matches(str(label), labels)}"
                )

    def require_agreement(self, info: ModelInfo) -> None:
        """InputError if device, dtype or positions ask of a model that is loaded already to be another than it is."""
        from phaselens.lens.sources import DTYPES

        device, dtype = self.device, self.dtype
        same_device = device == info.device or f"{device}:0" == info.device
        same_dtype = str(DTYPES.get(dtype)) == f"torch.{info.dtype}"
        nulled = self.positions.get(info.label) == "nope" and set(info.positions) != {"nope"}
        for name, asked, agrees, present in (
            ("device", device, device == "auto" or same_device, info.device),
            ("dtype", dtype, dtype == "auto" or same_dtype, info.dtype),
            ("positions", "nope", not nulled, ", ".join(sorted(set(info.positions)))),
        ):
            if not agrees:
                raise InputError(
                    f"{name} is {asked!r}, but {info.label} is loaded already, with {present}; give {name} to "
                    "phaselens.load, or leave it out"
                )

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


#: Metrics, or parameters by metric.
MetricRequests = MetricRequest | Iterable[MetricRequest] | Mapping[str | type[Metric[Any]], Mapping[str, Any]]


def choose(requests: MetricRequests) -> list[Chosen]:
    """Metrics from what a caller gave: names, classes, pairs of one of them and its parameters, or a mapping from
    them to their parameters.

    >>> [one.params.threshold for one in choose({"sinks": {"threshold": 0.9}})]
    [0.9]
    """
    chosen: list[Chosen] = []
    for asked, values in _requested(requests):
        one = _chosen(asked, values)
        if one.name in [other.name for other in chosen]:
            raise InputError(f"metric {one.name!r} is asked for twice; make two runs to compare parameters")
        chosen.append(one)
    if not chosen:
        raise InputError(f"no metric was asked for; {close_matches('', plugins().names)}")
    return chosen


_EXPECTED = "give names, Metric classes, pairs (metric, {parameter: value}), or a dict of such pairs"


def _requested(requests: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Each metric that is asked for, and its parameters."""
    if isinstance(requests, Mapping):
        listed: list[Any] = list(requests.items())
    elif isinstance(requests, str | type) or _is_pair(requests):
        listed = [requests]
    elif isinstance(requests, Iterable):
        listed = list(requests)
    else:
        raise InputError(f"metrics: {kind_of(requests)}; {_EXPECTED}")
    for request in listed:
        if isinstance(request, str | type):
            yield request, {}
        elif _is_pair(request) and isinstance(request[0], str | type):
            name = request[0] if isinstance(request[0], str) else request[0].__name__
            if not isinstance(request[1], Mapping):
                raise InputError(
                    f"metric {name!r}: its parameters are {kind_of(request[1])}; give a dict, such as "
                    "{'threshold': 0.3}, or the metric alone"
                )
            yield request
        else:
            raise InputError(f"metrics: {kind_of(request)}; {_EXPECTED}")


def _is_pair(request: Any) -> bool:
    """A metric and its parameters, and not two metrics."""
    return isinstance(request, tuple) and len(request) == 2 and not isinstance(request[1], str | type | tuple)


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
