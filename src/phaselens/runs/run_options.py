"""The models, options and metrics of a run; checked before torch or transformers is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from phaselens.data.tokens import require_bos
from phaselens.errors import LARGEST_WHOLE, InputError, close_matches, is_whole, require_text, short_form
from phaselens.lens.info import NO_ATTENTION, ROTATION_MODES
from phaselens.lens.model_source import BUNDLED, ModelSource, require_adapter_scale
from phaselens.lens.scaling import RopeScaling, require_softmax_scale
from phaselens.plugin import Metric, ModelInfo, Params, plugins, require_metric
from phaselens.plugin.author_errors import describe_value
from phaselens.runs.shards import DEFAULT_SHARD_TOKENS

#: Models of a run that names none.
DEFAULT_MODELS = BUNDLED

_LABEL = re.compile(r"(?P<label>[\w.+-]+)=(?P<source>.*)", re.DOTALL)


@dataclass(frozen=True)
class ModelSpec:
    """The parts of `[LABEL=]SOURCE[@REVISION]`."""

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
        """Parse `text`. An existing path is a path, whatever characters it contains.

        >>> ModelSpec.parse("base=org/model@v1.0")
        ModelSpec(source='org/model', label='base', revision='v1.0')
        """
        require_text("a model's name", text)
        label, source = None, ModelSource.identify(text)
        labelled = _LABEL.fullmatch(text) if source.kind == "other" else None
        if labelled:
            label, source = labelled["label"], ModelSource.identify(labelled["source"])
        if "@" in source.name and source.kind == "other":
            name, _, revision = source.name.partition("@")
            source = ModelSource.identify(name, revision)
            if name and source.kind == "folder":
                raise InputError(f"model {text!r}: a folder has no revisions; leave {'@' + revision!r} out")
            if not revision:
                raise InputError(f"model {text!r}: nothing follows the @; write SOURCE@REVISION or SOURCE")
        if not source.name:
            raise InputError(f"model {text!r} names no source; write [LABEL=]SOURCE[@REVISION]")
        spec = cls(source.name, label, source.revision)
        vars(spec)["identified"] = source  # parsing has looked at the path already
        return spec

    @cached_property
    def identified(self) -> ModelSource:
        """The source, identified at the first use."""
        return ModelSource.identify(self.source, self.revision)

    @property
    def short(self) -> str:
        """The label; without one, the last part of the source."""
        return self.label or self.identified.short


def distinct_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """Return a label for each model: its own, else the short name; where two are equal, more of their sources.

    `a/model` and `b/model` keep as many parts of their names as tell them apart, and two revisions of one source have
    `@REVISION`.
    """
    labels = [spec.short for spec in specs]
    for name in dict.fromkeys(labels):
        namesakes = [index for index, spec in enumerate(specs) if spec.short == name]
        unnamed = [index for index in namesakes if not specs[index].label]
        if len(namesakes) > 1 and unnamed:
            sources = [specs[index].source for index in unnamed]
            for index, tail in zip(unnamed, _distinct_tails(sources), strict=True):
                revision = specs[index].revision
                is_repeated = sources.count(specs[index].source) > 1
                labels[index] = f"{tail}@{revision}" if is_repeated and revision else tail
    require_distinct(labels)
    return labels


def _distinct_tails(sources: Sequence[str]) -> list[str]:
    """Return the last parts of each source, two or more, as many as tell different sources apart."""
    parts = [source.rstrip("/").split("/") for source in sources]
    depth = 2
    while True:
        tails = ["/".join(names[-depth:]) for names in parts]
        if len(set(tails)) == len(set(sources)) or depth >= max(map(len, parts)):
            return tails
        depth += 1


def require_distinct(labels: Sequence[str]) -> None:
    """Raise InputError if two models have the same label."""
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two models are labelled {label!r}; give each its own label: LABEL=SOURCE")


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    `bos` None keeps each lens' own policy; `positions` maps labels to rotation modes, and `adapter_scale` to numbers,
    unless it is one number for every model with an adapter. `max_tokens` is at least `window`. `threads` None takes
    the number of threads that PyTorch uses.
    """

    max_tokens: int = 512
    n_texts: int | None = None
    window: int | None = None
    stride: int | None = None
    batch_tokens: int = 8192
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    bos: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    positions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    adapter_scale: float | Mapping[str, float] | None = None
    softmax_scale: Mapping[str, float] = field(default_factory=dict)
    rope_scaling: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        minimums = {
            "max_tokens": 1,
            "n_texts": 1,
            "window": 1,
            "stride": 1,
            "batch_tokens": 1,
            "shard_tokens": 1,
            "seed": 0,
            "threads": 1,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if name in ("n_texts", "window", "stride", "threads") and value is None:
                continue
            if not is_whole(value) or not minimum <= value <= LARGEST_WHOLE:
                raise InputError(
                    f"{name} is {short_form(value)}; give a whole number of at least {minimum}"
                    f"{'' if not is_whole(value) or value < minimum else f' and at most {LARGEST_WHOLE}'}"
                )
            object.__setattr__(self, name, int(value))  # numpy's whole numbers cannot be written as JSON
        if self.stride is not None and self.window is None:
            raise InputError("stride is the distance between windows; give window too (--window)")
        if self.window is not None:
            object.__setattr__(self, "max_tokens", max(self.max_tokens, self.window))
        for name in ("bos", "device", "dtype"):
            if not isinstance(getattr(self, name), str) and not (name == "bos" and self.bos is None):
                raise InputError(f"{name} is {describe_value(getattr(self, name))}; give text")
        if self.bos is not None:
            require_bos(self.bos)
        if self.device_map is not None and not isinstance(self.device_map, str):
            raise InputError(f"device_map is {describe_value(self.device_map)}; give auto or a JSON file")
        if not isinstance(self.positions, Mapping):
            raise InputError(
                f"positions is {describe_value(self.positions)}; give a dict from labels to "
                f"{' or '.join(ROTATION_MODES)}, such as {{'rope': 'nope'}}"
            )
        for label, rotation_mode in self.positions.items():
            if not isinstance(rotation_mode, str) or rotation_mode not in ROTATION_MODES:
                raise InputError(
                    f"positions of {label!r}: {short_form(rotation_mode)}; "
                    f"{close_matches(rotation_mode, ROTATION_MODES)}"
                )
        scales = (
            self.adapter_scale.values() if isinstance(self.adapter_scale, Mapping) else [self.adapter_scale]
        )
        for scale in scales:
            require_adapter_scale(scale)
        for name, example in (("softmax_scale", {"rope": 0.125}), ("rope_scaling", {"rope": "yarn:4"})):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(
                    f"{name} is {describe_value(getattr(self, name))}; give a dict by label, such as {example}"
                )
        for softmax_scale in self.softmax_scale.values():
            require_softmax_scale(softmax_scale)
        for scaling in self.rope_scaling.values():
            RopeScaling.parse(scaling)

    def require_labels(self, labels: Sequence[str]) -> None:
        """Raise InputError if an option by label names a model that the run does not have."""
        scales = self.adapter_scale if isinstance(self.adapter_scale, Mapping) else {}
        options = {
            "positions": self.positions,
            "adapter_scale": scales,
            "softmax_scale": self.softmax_scale,
            "rope_scaling": self.rope_scaling,
        }
        for option, by_label in options.items():
            for label in by_label:
                if label not in labels:
                    raise InputError(
                        f"{option}: no model is labelled {short_form(label)}; {close_matches(label, labels)}"
                    )

    def require_adapters(self, specs: Sequence[ModelSpec]) -> None:
        """Raise InputError if one scale is given for all adapters, and no model named by text has an adapter."""
        if self.adapter_scale is None or isinstance(self.adapter_scale, Mapping):
            return
        if all(spec.identified.named_adapter is None for spec in specs):
            raise InputError(
                f"adapter_scale is {self.adapter_scale:g}, but no model named by text has an adapter; write "
                "BASE+ADAPTER, or leave it out"
            )

    def adapter_scale_of(self, label: str, spec: ModelSpec) -> float | None:
        """Return the scale of a model's adapter; None to merge it, and for a model without one."""
        if isinstance(self.adapter_scale, Mapping):
            return self.adapter_scale.get(label)
        return self.adapter_scale if spec.identified.named_adapter is not None else None

    def require_agreement(self, info: ModelInfo, nulled_layers: Sequence[int] = ()) -> None:
        """Raise InputError if an option differs from that of a model that is already loaded.

        `nulled_layers` are the layers whose rotation was nulled when or after it was loaded.
        """
        from phaselens.lens.checkpoints import DTYPES

        device, dtype = self.device, self.dtype
        same_device = device == info.device or f"{device}:0" == info.device
        same_dtype = str(DTYPES.get(dtype)) == f"torch.{info.dtype}"
        rotation_mode = self.positions.get(info.label)
        encodings = {encoding for encoding in info.positions if encoding != NO_ATTENTION}
        same_rotation = rotation_mode is None or (
            encodings <= {"nope"} if rotation_mode == "nope" else not nulled_layers
        )
        adapter_scale = (
            self.adapter_scale.get(info.label) if isinstance(self.adapter_scale, Mapping) else None
        )
        scale, scaling = self.softmax_scale.get(info.label), self.rope_scaling.get(info.label)
        same_scaling = scaling is None or str(RopeScaling.parse(scaling)) == info.rope_scaling
        for name, requested, agrees, actual in (
            ("softmax_scale", scale, scale in (None, info.softmax_scale), info.softmax_scale),
            ("rope_scaling", scaling, same_scaling, info.rope_scaling),
            ("device", device, device == "auto" or same_device, info.device),
            ("dtype", dtype, dtype == "auto" or same_dtype, info.dtype),
            ("positions", rotation_mode, same_rotation, ", ".join(sorted(encodings))),
            ("adapter_scale", adapter_scale, adapter_scale is None, info.adapter or "no adapter"),
        ):
            if not agrees:
                raise InputError(
                    f"{name} is {requested!r}, but {info.label} is already loaded, with {actual}; give {name} to "
                    "phaselens.load, or leave it out"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        scale = self.adapter_scale
        return asdict(self) | {
            "positions": dict(self.positions),
            "adapter_scale": dict(scale) if isinstance(scale, Mapping) else scale,
            "softmax_scale": dict(self.softmax_scale),
            "rope_scaling": dict(self.rope_scaling),
        }


@dataclass(frozen=True)
class SelectedMetric:
    """A metric that a run will use, with its parameters and the distribution it comes from.

    `is_plugin` is False for a metric that was requested as a class rather than by a plugin's name.
    """

    metric: type[Metric[Any]]
    params: Params
    distribution: str
    is_plugin: bool

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.metric.name


MetricRequest = str | type[Metric[Any]] | tuple[str | type[Metric[Any]], Mapping[str, Any]]


#: Metrics, or a mapping from metrics to their parameters.
MetricRequests = MetricRequest | Iterable[MetricRequest] | Mapping[str | type[Metric[Any]], Mapping[str, Any]]


def select_metrics(requests: MetricRequests) -> list[SelectedMetric]:
    """Return metrics with parameters, from names, classes, (metric, parameters) pairs, or a mapping of such pairs.

    Raises:
        InputError: for two metrics of one name, an unknown one, and without a metric.

    >>> [selected.params.threshold for selected in select_metrics({"sinks": {"threshold": 0.9}})]
    [0.9]
    """
    selection: list[SelectedMetric] = []
    for metric, values in _metrics_and_values(requests):
        selected = _selected_metric(metric, values)
        if selected.name in [previous.name for previous in selection]:
            raise InputError(
                f"metric {selected.name!r} is requested twice; make two runs to compare parameters"
            )
        selection.append(selected)
    if not selection:
        raise InputError(f"no metric was requested; {close_matches('', plugins().names)}")
    return selection


_EXPECTED = "give names, Metric classes, pairs (metric, {parameter: value}), or a dict of such pairs"


def _metrics_and_values(requests: object) -> Iterator[tuple[str | type, Mapping[str, Any]]]:
    """Yield each requested metric, by name or class, and the values of its parameters."""
    if isinstance(requests, Mapping):
        entries: list[Any] = list(requests.items())
    elif isinstance(requests, str | type) or _is_pair(requests):
        entries = [requests]
    elif isinstance(requests, Iterable):
        entries = list(requests)
    else:
        raise InputError(f"metrics: {describe_value(requests)}; {_EXPECTED}")
    for request in entries:
        if isinstance(request, str | type):
            yield request, {}
        elif _is_pair(request) and isinstance(request[0], str | type):
            name = request[0] if isinstance(request[0], str) else request[0].__name__
            if not isinstance(request[1], Mapping):
                raise InputError(
                    f"metric {name!r}: its parameters are {describe_value(request[1])}; give a dict, such as "
                    "{'threshold': 0.3}, or the metric alone"
                )
            yield request
        else:
            raise InputError(f"metrics: {describe_value(request)}; {_EXPECTED}")


def _is_pair(request: object) -> bool:
    """Whether `request` is a metric and its parameters, rather than two metrics."""
    return isinstance(request, tuple) and len(request) == 2 and not isinstance(request[1], str | type | tuple)


def _selected_metric(requested: str | type, values: Mapping[str, Any]) -> SelectedMetric:
    if isinstance(requested, str):
        metric = plugins().metric(requested)
        origin = plugins().origin(requested)
        distribution = f"{origin.distribution} {origin.version}"
    else:
        try:
            metric = require_metric(requested, "metrics")
        except TypeError as error:
            raise InputError(str(error)) from error
        distribution = f"module {metric.__module__}"
    try:
        params = metric.Params.parse(values)
    except InputError as error:
        raise InputError(f"{metric.name}: {error}") from error
    return SelectedMetric(metric, params, distribution, isinstance(requested, str))
