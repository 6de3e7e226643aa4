"""One forward over a batch feeds all metrics, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.lens.points import depends_on_sink_position, is_logits
from phaselens.plugin import Batch, LayerView, Metric
from phaselens.plugin.return_checks import hook_names, require_constructed
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import out_of_memory_explained
from phaselens.runs.layer_points import points_to_read
from phaselens.runs.observer import Observer
from phaselens.runs.result import MetricResult
from phaselens.runs.weights import copied_projection, copied_weight

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


def activate(lens: HookedTransformer, metric: Metric[Any], result: MetricResult) -> ActiveMetric:
    """Return the metric with the hook points that it reads, checked.

    Raises:
        TypeError: for a metric that is not constructed properly, or hooks that are not a list of names.
        InputError: for a hook point that the model does not have.
    """
    require_constructed(metric)
    points = points_to_read(lens, metric, hook_names(metric))
    if points is None:
        return ActiveMetric(metric, result, has_values=False)
    return ActiveMetric(metric, result, points, metric.sink_position, metric.n_distances)


def group_by_pass(active_metrics: Sequence[ActiveMetric]) -> dict[int, list[ActiveMetric]]:
    """Group metrics by the sink position that they need; those that do not depend on it join the first pass."""
    passes: dict[int, list[ActiveMetric]] = {}
    independent = []
    for active in active_metrics:
        if not active.points:
            continue  # a causal metric that does not read the unedited model
        if any(map(depends_on_sink_position, active.points)):
            passes.setdefault(active.sink_position, []).append(active)
        else:
            independent.append(active)
    if independent:
        passes.setdefault(next(iter(passes), 0), []).extend(independent)
    return passes


def forward(
    lens: HookedTransformer,
    batch: Batch,
    members: Sequence[ActiveMetric],
    sink_position: int,
    observer: Observer | None = None,
) -> None:
    """Run one batch through the model, and pass its layers to every metric that still works.

    `observer` receives the progress within the batch, by its layers.
    """
    import torch

    working = [member for member in members if member.works and _reads(member, batch)]
    names = list(dict.fromkeys(name for member in working for name in member.points))
    if not names:
        return
    dispatcher = LayerDispatcher(lens, batch, list(map(reader_of, working)), observer)
    with torch.no_grad():
        with out_of_memory_explained(lens, batch):
            lens.stream(
                batch.tokens,
                [(name, dispatcher.hook(name)) for name in names],
                lengths=batch.lengths_on(lens.device),
                sink_position=sink_position,
                n_distances=max(member.n_distances for member in working),
                unembed=any(map(is_logits, names)),
                reads_only=True,  # metrics get copies
            )
        dispatcher.finish_layer()
    dispatcher.require_fired()


def _reads(member: ActiveMetric, batch: Batch) -> bool:
    """Return whether a metric reads the batch; an exception is recorded as its failure."""
    with guarded(member.result, member.metric.model.label, "reads"):
        return bool(member.metric.reads(batch.private_copy()))
    return False


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


def reader_of(active: ActiveMetric) -> Reader:
    """Return the reader that updates a metric with the unedited model's activations."""
    return Reader(active.points, active.metric.update, active.result, active.metric.model.label)


class LayerDispatcher:
    """Collects the activations of one layer, updates each reader once all of its points have fired, and frees them.

    A point outside of the layers is dispatched alone, under its own name in place of a layer.
    """

    def __init__(
        self,
        lens: HookedTransformer,
        batch: Batch,
        readers: Sequence[Reader],
        observer: Observer | None = None,
    ) -> None:
        self._lens = lens
        self._observer = observer
        self._n_tokens = sum(batch.lengths)
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
                if self._observer is not None:
                    self._observer.reading(self._n_tokens * layer / self._lens.info.n_layers)
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
