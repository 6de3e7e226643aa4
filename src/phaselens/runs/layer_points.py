"""The hook points that a metric reads in one model, of whose layers some may lack some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phaselens.lens.points import in_each_layer, layer_and_point
from phaselens.plugin import Metric

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

Points = dict[str, tuple[int | None, str]]
"""Hook names, each with its layer and its name within the layer."""


def points_to_read(lens: HookedTransformer, metric: Metric[Any], patterns: Sequence[str]) -> Points | None:
    """Return the points that the metric reads, with `{layer}` filled in; None if no layer of the model has them, for a
    reason that the model states.

    A layer that lacks one of the points of patterns with `{layer}` is left out, unless the metric reads partial layers.
    The metric then warns, and its values there are missing.

    Raises:
        InputError: for a hook point that the model does not have, or that none of its layers has.
    """
    n_layers = lens.info.n_layers
    everywhere = [pattern for pattern in patterns if "{layer}" in pattern]
    lacking: dict[int, list[str]] = {}
    for pattern in everywhere:
        names = in_each_layer(pattern, n_layers)
        missing = [layer for layer, name in enumerate(names) if lens.find_hook(name) is None]
        if len(missing) == n_layers and lens.info.absence(names[0]) is None:
            lens.require_hook(names[0])
        for index in missing:
            lacking.setdefault(index, []).append(names[index])
    for pattern in patterns:
        own_layer = layer_and_point(pattern)[0]
        if own_layer is not None and lens.find_hook(pattern) is None:
            if lens.info.absence(pattern) is None:
                lens.require_hook(pattern)
            lacking.setdefault(own_layer, []).append(pattern)
    is_unserved = any(pattern in names for names in lacking.values() for pattern in patterns)
    left_out = set() if metric.partial_layers else set(lacking)
    points: Points = {}
    for pattern in patterns:
        for name in in_each_layer(pattern, n_layers):
            layer, point = layer_and_point(name)
            if lens.find_hook(name) is None and (is_unserved or pattern in everywhere):
                continue
            if pattern in everywhere and layer in left_out:
                continue
            lens.require_hook(name)
            points[name] = layer, point
    if lacking:
        metric.per_text.n_layers = n_layers
        for message in _messages(lens, lacking, named=metric.partial_layers):
            metric.warn(message)
    return None if is_unserved or len(left_out) == n_layers or (everywhere and not points) else points


def _messages(lens: HookedTransformer, lacking: dict[int, list[str]], *, named: bool) -> list[str]:
    """Return one message for each reason why layers lack points.

    Args:
        named: name the points, since only what is measured there is missing.
    """
    points_by_reason: dict[str, list[str]] = {}
    layers_by_reason: dict[str, list[int]] = {}
    for layer, names in lacking.items():
        for name in names:
            reason = lens.info.absence(name) or f"there is no {layer_and_point(name)[1]}"
            reason = reason.removeprefix(f"layer {layer} is ")
            layers = layers_by_reason.setdefault(reason, [])
            points = points_by_reason.setdefault(reason, [])
            if (point := layer_and_point(name)[1]) not in points:
                points.append(point)
            if layer not in layers:
                layers.append(layer)
    messages = []
    for reason, layers in layers_by_reason.items():
        numbers = ", ".join(map(str, layers))
        verb = f"layer {numbers} is" if len(layers) == 1 else f"layers {numbers} are"
        if any(reason == lens.info.kind_of(layer) for layer in layers):
            messages.append(f"{verb} {reason}, so values are missing there")
        else:
            subject = f"values of {', '.join(points_by_reason[reason])}" if named else "values"
            messages.append(f"{subject} are missing in layer {numbers}: {reason}")
    return messages
