"""Conditions that other causal metrics declare, for a metric that tries them on prompts of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phaselens.plugin import CausalMetric, Condition, InputError, LayerView, ModelInfo, Params, plugins

HELP = (
    "causal metrics whose conditions are tried, each with its parameters, separated by semicolons: "
    "bos-mlp layer=1; qk-disruption"
)
_IN_LAYER = re.compile(r"blocks\.(\{layer\}|\d+)\.(.+)")


@dataclass(frozen=True)
class Asked:
    """One causal metric by name, and what it was asked for. `label` is its name, or as it was written where one metric
    is asked for twice.
    """

    label: str
    metric: type[CausalMetric[Any]]
    params: Params

    def names(self, own: str) -> str:
        """What one of its conditions is called here."""
        return own if own == self.label else f"{self.label}: {own}"


def parse(text: str) -> list[Asked]:
    """The metrics that `text` names: `NAME [PARAMETER=VALUE …]`, separated by semicolons.

    Raises:
        InputError: for a name that no plugin has, one that is no causal metric, or a parameter that it does not take.
    """
    asked: list[Asked] = []
    for part in text.split(";"):
        try:
            words = shlex.split(part)
        except ValueError as error:
            raise InputError(
                f"conditions {part.strip()!r}: {error}; write NAME [PARAMETER=VALUE …]; …"
            ) from error
        if not words:
            continue
        one = _one(words)
        if any(one.label == other.label for other in asked):
            raise InputError(f"conditions: {one.label!r} stands there twice; keep one")
        asked.append(one)
    names = [one.metric.name for one in asked]
    return [one if names.count(one.metric.name) > 1 else replace(one, label=one.metric.name) for one in asked]


def _one(words: Sequence[str]) -> Asked:
    name, *settings = words
    metric = plugins().metric(name)
    if not issubclass(metric, CausalMetric):
        raise InputError(
            f"conditions: {name!r} changes nothing in a model; name a causal metric, such as bos-mlp"
        )
    values: dict[str, str] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise InputError(f"conditions: {setting!r} after {name!r}: write PARAMETER=VALUE")
        if key in values:
            raise InputError(f"conditions: {key} of {name!r} is given twice; keep one")
        values[key.replace("-", "_")] = value
    try:
        params = metric.Params.parse(values)
    except InputError as error:
        raise InputError(f"conditions: {name}: {error}") from error
    return Asked(" ".join(words), metric, params)


class Inner:
    """The metrics at work on one model: they see the run's texts, and then say what to change."""

    def __init__(self, asked: Sequence[Asked], model: ModelInfo, seed: int) -> None:
        self.asked = list(asked)
        self.metrics = [one.metric(model, one.params, seed) for one in asked]

    def hooks(self) -> list[str]:
        """The points that any of them reads."""
        return list(dict.fromkeys(name for metric in self.metrics for name in metric.hooks()))

    @property
    def sink_position(self) -> int:
        """The key whose share `hook_sink` holds, which must be the same for all that read it."""
        wanted = {
            metric.sink_position: one.label
            for one, metric in zip(self.asked, self.metrics, strict=True)
            if any(name.endswith(".hook_sink") for name in metric.hooks())
        }
        if len(wanted) > 1:
            raise InputError(
                f"conditions: {' and '.join(wanted.values())} read hook_sink of different positions"
            )
        return next(iter(wanted), 0)

    @property
    def n_distances(self) -> int:
        """As many as the one that wants most."""
        return max((metric.n_distances for metric in self.metrics), default=1)

    def update(self, layer: LayerView) -> None:
        """Hand each metric the points that it asked for."""
        for metric in self.metrics:
            wanted = set(_in_layer(metric.hooks(), layer.index))
            mine = layer.apart(wanted)
            if mine:
                metric.update(mine)

    def merge(self, other: Inner) -> None:
        """Take over what the same metrics gathered on other texts."""
        for mine, theirs in zip(self.metrics, other.metrics, strict=True):
            mine.merge(theirs)

    def conditions(self) -> Iterator[Condition]:
        """All their conditions, each under its metric's name."""
        for one, metric in zip(self.asked, self.metrics, strict=True):
            for condition in metric.conditions():
                control_for = condition.control_for
                yield replace(
                    condition,
                    name=one.names(condition.name),
                    control_for=None if control_for is None else one.names(control_for),
                )

    @property
    def warnings(self) -> list[str]:
        """What they warned of, each under its metric's name."""
        return [
            f"{one.label}: {warning}"
            for one, metric in zip(self.asked, self.metrics, strict=True)
            for warning in metric.warnings
        ]


def _in_layer(patterns: Sequence[str], index: int | None) -> Iterator[str]:
    """The names, as a LayerView holds them, of the points that are in this layer."""
    for pattern in patterns:
        inside = _IN_LAYER.fullmatch(pattern)
        if inside is None:
            if index is None:
                yield pattern
        elif inside[1] == "{layer}" or inside[1] == str(index):
            yield inside[2]
