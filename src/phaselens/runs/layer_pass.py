"""One forward over a batch feeds all metrics, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.lens.points import depends_on_sink_position, is_logits
from phaselens.plugin import Batch, LayerView, Metric
from phaselens.plugin.return_checks import hook_names, require_constructed
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import out_of_memory_explained
from phaselens.runs.layer_points import points_to_read
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
    lens: HookedTransformer, batch: Batch, members: Sequence[ActiveMetric], sink_position: int
) -> None:
    """Run one batch through the model, and pass its layers to every metric that still works."""
    import torch

    working = [member for member in members if member.works]
    names = list(dict.fromkeys(name for member in working for name in member.points))
    if not names:
        return
    dispatcher = _LayerDispatcher(lens, batch, working)
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


class _LayerDispatcher:
    """Collects the activations of one layer, updates each metric once all of its points have fired, and frees them.

    A point outside of the layers is dispatched alone, under its own name in place of a layer.
    """

    def __init__(self, lens: HookedTransformer, batch: Batch, members: Sequence[ActiveMetric]) -> None:
        self._lens = lens
        self._members = members
        self._layer: int | None = None
        #: Each metric has its own copy of the batch's tensors.
        self._batches = {id(member): batch.private_copy() for member in members}
        self._activations: dict[str, Tensor] = {}
        self._fired: set[str] = set()
        self._points = {name: point for member in members for name, point in member.points.items()}
        #: Metrics that were not updated yet, with the points they need, by layer or point outside of the layers.
        self._pending: dict[int | str, list[tuple[ActiveMetric, frozenset[str]]]] = {}
        for member in members:
            names_by_key: dict[int | str, set[str]] = {}
            for name in member.points:
                names_by_key.setdefault(self._key(name), set()).add(name)
            for key, names in names_by_key.items():
                self._pending.setdefault(key, []).append((member, frozenset(names)))

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
        """Update the metrics whose points have all fired, and keep only activations that others still need."""
        pending = self._pending.get(key, [])
        complete = [(member, names) for member, names in pending if names <= self._activations.keys()]
        if complete:
            pending[:] = [
                (member, names) for member, names in pending if not names <= self._activations.keys()
            ]
            for member, names in complete:
                self._update(member, names)
            needed = {name for _, names in pending for name in names}
            self._activations = {name: tensor for name, tensor in self._activations.items() if name in needed}

    def finish_layer(self) -> None:
        """Update the metrics that still wait for a point of this layer with the activations that did fire."""
        if self._layer is not None:
            for member, names in self._pending.pop(self._layer, []):
                self._update(member, names & self._activations.keys())
        self._activations = {}

    def _update(self, member: ActiveMetric, names: Collection[str]) -> None:
        # In the order in which they fired, which `names` does not keep.
        activations = {
            member.points[name][1]: tensor for name, tensor in self._activations.items() if name in names
        }
        if activations and member.works:
            layer = next(member.points[name][0] for name in names)
            weight = functools.partial(copied_weight, self._lens, layer)
            projection = functools.partial(copied_projection, self._lens, layer)
            with guarded(member.result, member.metric.model.label, "update"):
                view = LayerView(layer, self._batches[id(member)], activations, weight, projection)
                member.metric.update(view)

    def require_fired(self) -> None:
        """Fail each metric that hooked a point that exists but did not fire, rather than leave its values missing."""
        for member in self._members:
            silent = [name for name in member.points if name not in self._fired]
            if silent and member.works:
                with guarded(member.result, member.metric.model.label, "update"):
                    raise InputError(f"hook point {silent[0]!r} did not fire in this model's forward")
