"""Dispatch of a forward's activations, layer by layer, to the metrics that read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.lens.points import in_each_layer, layer_and_point
from phaselens.plugin import Batch, LayerView
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.result import MetricResult
from phaselens.runs.weights import copied_projection, copied_weight

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


@dataclass(frozen=True, eq=False)
class Reader:
    """A function that takes a layer's activations, on behalf of a metric.

    `points` maps the hook names that it reads to (layer, name within the layer). An exception is recorded in `result`,
    under the model's `label`, and ends its updates.
    """

    points: Mapping[str, tuple[int | None, str]]
    update: Callable[[LayerView], None]
    result: MetricResult
    label: str

    @property
    def works(self) -> bool:
        """Whether the metric has not failed on this model."""
        return not any(failure.model == self.label for failure in self.result.failures)


def points_of(lens: HookedTransformer, patterns: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Map hook names with `{layer}` filled in to (layer, name within the layer).

    Raises:
        InputError: for a hook point that the model does not have.
    """
    points: dict[str, tuple[int | None, str]] = {}
    for pattern in patterns:
        for name in in_each_layer(pattern, lens.info.n_layers):
            lens.require_hook(name)
            points[name] = layer_and_point(name)
    return points


def reader_of(active: ActiveMetric) -> Reader:
    """Return the reader that updates a metric with the unedited model's activations."""
    return Reader(active.points, active.metric.update, active.result, active.metric.model.label)


class LayerDispatcher:
    """Collects the activations of one layer, updates each reader once all of its points have fired, and frees them.

    A point outside of the layers is dispatched alone, under its own name in place of a layer.
    """

    def __init__(self, lens: HookedTransformer, batch: Batch, readers: Sequence[Reader]) -> None:
        self._lens = lens
        self._readers = readers
        self._layer: int | None = None
        #: Each reader has its own copy of the batch's tensors.
        self._batches = {id(reader): batch.private_copy() for reader in readers}
        self._activations: dict[str, Tensor] = {}
        self._fired: set[str] = set()
        self._points = {name: point for reader in readers for name, point in reader.points.items()}
        #: Readers that were not updated yet, with the points they need, by layer or point outside of the layers.
        self._pending: dict[int | str, list[tuple[Reader, frozenset[str]]]] = {}
        for reader in readers:
            names_by_key: dict[int | str, set[str]] = {}
            for name in reader.points:
                names_by_key.setdefault(self._key(name), set()).add(name)
            for key, names in names_by_key.items():
                self._pending.setdefault(key, []).append((reader, frozenset(names)))

    def _key(self, name: str) -> int | str:
        """Return the layer of a point, or its name if it is outside of the layers."""
        layer, _ = self._points[name]
        return name if layer is None else layer

    def hook(self, name: str) -> Callable[[Tensor, object], None]:
        """Return the function to hook on the point `name`."""
        layer, key = self._points[name][0], self._key(name)

        def collect(tensor: Tensor, hook: object) -> None:
            if layer is not None and layer != self._layer:
                self.finish_layer()
                self._layer = layer
            self._activations[name] = tensor
            self._fired.add(name)
            self._update_complete(key)

        return collect

    def _update_complete(self, key: int | str) -> None:
        """Update the readers whose points have all fired, and keep only activations that others still need."""
        pending = self._pending.get(key, [])
        complete = [(reader, names) for reader, names in pending if names <= self._activations.keys()]
        if complete:
            pending[:] = [
                (reader, names) for reader, names in pending if not names <= self._activations.keys()
            ]
            for reader, names in complete:
                self._update(reader, names)
            needed = {name for _, names in pending for name in names}
            self._activations = {name: tensor for name, tensor in self._activations.items() if name in needed}

    def finish_layer(self) -> None:
        """Update the readers that still wait for a point of this layer with the activations that did fire."""
        if self._layer is not None:
            for reader, names in self._pending.pop(self._layer, []):
                self._update(reader, names & self._activations.keys())
        self._activations = {}

    def _update(self, reader: Reader, names: Collection[str]) -> None:
        # In the order in which they fired, which `names` does not keep.
        activations = {
            reader.points[name][1]: tensor for name, tensor in self._activations.items() if name in names
        }
        if activations and reader.works:
            layer = next(reader.points[name][0] for name in names)
            weight = functools.partial(copied_weight, self._lens, layer)
            projection = functools.partial(copied_projection, self._lens, layer)
            with guarded(reader.result, reader.label, "update"):
                view = LayerView(layer, self._batches[id(reader)], activations, weight, projection)
                reader.update(view)

    def require_fired(self) -> None:
        """Fail each reader that hooked a point that exists but did not fire, rather than leave its values missing."""
        for reader in self._readers:
            silent = [name for name in reader.points if name not in self._fired]
            if silent and reader.works:
                with guarded(reader.result, reader.label, "update"):
                    raise InputError(f"hook point {silent[0]!r} did not fire in this model's forward")
