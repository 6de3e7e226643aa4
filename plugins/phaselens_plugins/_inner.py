"""Conditions that other causal metrics declare, for a metric that runs them on its own prompts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phaselens.plugin import (
    CausalMetric,
    Condition,
    InputError,
    LayerView,
    MetricWarning,
    ModelInfo,
    NestedState,
    Params,
    plugins,
)

CONDITIONS_HELP = (
    "causal metrics whose conditions are run, each with its parameters, separated by semicolons: "
    "bos-mlp layer=1; qk-disruption"
)


@dataclass(frozen=True)
class ConditionSource:
    """A causal metric and its parameters. `label` is the metric's name, or the source text if the name occurs twice."""

    label: str
    metric_class: type[CausalMetric[Any]]
    params: Params

    def condition_name(self, name: str) -> str:
        """Return the name under which the outer metric runs the condition `name` of this one."""
        return name if name == self.label else f"{self.label}: {name}"

    def named(self, condition: Condition) -> Condition:
        """Return a condition of this metric under the name that the outer metric runs it by."""
        control_for = condition.control_for
        return replace(
            condition,
            name=self.condition_name(condition.name),
            control_for=None if control_for is None else self.condition_name(control_for),
        )


def parse_sources(text: str) -> list[ConditionSource]:
    """Return the metrics that `text` names: `NAME [PARAMETER=VALUE …]`, separated by semicolons.

    Raises:
        InputError: for an unknown name, a metric that is not causal, or an unknown parameter.
    """
    sources: list[ConditionSource] = []
    for source_text in text.split(";"):
        try:
            words = shlex.split(source_text)
        except ValueError as error:
            raise InputError(
                f"conditions {source_text.strip()!r}: {error}; write NAME [PARAMETER=VALUE …]; …"
            ) from error
        if not words:
            continue
        source = _parse_source(words)
        if any(source.label == earlier.label for earlier in sources):
            raise InputError(f"conditions: {source.label!r} is given twice; keep one")
        sources.append(source)
    names = [source.metric_class.name for source in sources]
    return [
        source
        if names.count(source.metric_class.name) > 1
        else replace(source, label=source.metric_class.name)
        for source in sources
    ]


def _parse_source(words: Sequence[str]) -> ConditionSource:
    name, *settings = words
    metric_class = plugins().metric(name)
    if not issubclass(metric_class, CausalMetric):
        raise InputError(
            f"conditions: {name!r} does not change the model; name a causal metric, such as bos-mlp"
        )
    given: dict[str, str] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise InputError(f"conditions: {setting!r} after {name!r}: write PARAMETER=VALUE")
        if key in given:
            raise InputError(f"conditions: {key} of {name!r} is given twice; keep one")
        given[key.replace("-", "_")] = value
    try:
        params = metric_class.Params.parse({**metric_class.nested_defaults, **given})
    except InputError as error:
        raise InputError(f"conditions: {name}: {error}") from error
    return ConditionSource(" ".join(words), metric_class, params)


class InnerMetrics:
    """Causal metrics that another metric runs on one model: they see the run's texts, then declare conditions."""

    def __init__(self, sources: Sequence[ConditionSource], model: ModelInfo, seed: int) -> None:
        self.sources = list(sources)
        self.metrics = [source.metric_class(model, source.params, seed) for source in sources]

    def hooks(self) -> list[str]:
        """Return the hook points that any of the metrics reads."""
        return list(dict.fromkeys(name for metric in self.metrics for name in metric.hooks()))

    @property
    def sink_position(self) -> int:
        """The key whose attention `hook_sink` holds, which must be the same for all metrics that read it."""
        label_by_position = {
            metric.sink_position: source.label
            for source, metric in zip(self.sources, self.metrics, strict=True)
            if metric.needs_sink_position
        }
        if len(label_by_position) > 1:
            raise InputError(
                f"conditions: {' and '.join(label_by_position.values())} read hook_sink of different positions"
            )
        return next(iter(label_by_position), 0)

    @property
    def n_distances(self) -> int:
        """The largest number of distances that any of the metrics needs."""
        return max((metric.n_distances for metric in self.metrics), default=1)

    def update(self, layer: LayerView) -> None:
        """Forward to each metric the points that it hooks."""
        for metric in self.metrics:
            names = metric.hooks()
            view = layer.private_copy(names)
            if view and (view.has_all(names) or metric.partial_layers):
                metric.update(view)

    def merge(self, other: InnerMetrics) -> None:
        """Merge each metric with its counterpart, which has seen other texts."""
        for metric, counterpart in zip(self.metrics, other.metrics, strict=True):
            metric.merge(counterpart)

    def state(self) -> dict[str, NestedState]:
        """Return the state of each metric by its label."""
        return {
            source.label: NestedState(metric.state())
            for source, metric in zip(self.sources, self.metrics, strict=True)
        }

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Restore the state of each metric."""
        for source, metric in zip(self.sources, self.metrics, strict=True):
            metric.load_state(tree[source.label])

    def conditions(self) -> Iterator[Condition]:
        """Yield the conditions of all metrics, each under its metric's label."""
        for source, metric in zip(self.sources, self.metrics, strict=True):
            yield from map(source.named, metric.conditions())

    @property
    def warnings(self) -> list[MetricWarning]:
        """Warnings of all metrics, each under its metric's label."""
        return [
            MetricWarning(warning).prefixed(source.label)
            for source, metric in zip(self.sources, self.metrics, strict=True)
            for warning in metric.warnings
        ]
