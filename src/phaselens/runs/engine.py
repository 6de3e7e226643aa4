"""One model, one set of texts, all metrics: the passes, and the handing out of layers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.data import Tokens, pack
from phaselens.errors import InputError, MetricError, is_list_like, require_kind, require_wholes, short_form
from phaselens.lens.info import require_lens
from phaselens.plugin import Batch, CausalMetric, LayerView, Metric, Table
from phaselens.plugin.returned import hook_names, require_constructed, require_defined, tables_of
from phaselens.runs.causal import Interventions, intervene
from phaselens.runs.interventions import projection_of, weight_of
from phaselens.runs.options import Chosen
from phaselens.runs.result import MetricResult
from phaselens.runs.work import Measured, Observer, batch_of, guarded, memory_named

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

_IN_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def measure(
    lens: HookedTransformer,
    texts: Sequence[Tokens],
    chosen: Sequence[Chosen],
    results: Mapping[str, MetricResult],
    *,
    batch_tokens: int,
    seed: int,
    observer: Observer,
    bos: str | None = None,
) -> tuple[dict[str, Mapping[str, Table]], list[str]]:
    """Run all metrics on one model: their tables by metric, and what they warn of.

    Metrics share one pass over the texts; only a metric that measures another sink position needs its own. Causal
    metrics then share a second one, in which every condition branches off.
    """
    at_work: list[Measured] = []
    for one in chosen:
        with guarded(results[one.name], lens.info.label, "construct"):
            # Before a metric is made of parameters that it cannot define.
            require_defined(one.metric, one.params)
            at_work.append(_at_work(lens, one.metric(lens.info, one.params, seed), results[one.name]))
    passes = _passes(at_work)
    batches = pack([len(text.ids) for text in texts], batch_tokens)
    if passes:
        observer.measuring(lens.info.label, len(passes) * sum(len(text.ids) for text in texts))
    for sink_position, members in passes.items():
        for indices in batches:
            _forward(lens, batch_of(lens, texts, indices), members, sink_position)
            observer.advance(sum(len(texts[index].ids) for index in indices))
    intervene(lens, texts, batches, at_work, Interventions(batch_tokens, bos or lens.bos, observer))
    tables: dict[str, Mapping[str, Table]] = {}
    warnings: list[str] = []
    for measured in at_work:
        metric = measured.metric
        if measured.works:
            with guarded(measured.result, lens.info.label, "compute"):
                tables[metric.name] = tables_of(metric)
                metric.warnings.extend(_not_finite(tables[metric.name]))
        warnings.extend(f"{metric.name}: {lens.info.label}: {warning}" for warning in metric.warnings)
    return tables, warnings


def gather(
    lens: HookedTransformer, texts: Sequence[Tokens], metric: Metric[Any], batches: Sequence[Sequence[int]]
) -> None:
    """Feed one metric outside of a run with `batches`, each of places in `texts`. Nothing is computed yet, and a
    causal metric's conditions are not run (`gather_losses`).

    Raises:
        MetricError: what the metric raised, with its traceback.
    """
    _require_fed(lens, texts, metric, Metric, batches)
    result = MetricResult(type(metric), metric.params, "")
    require_defined(type(metric), metric.params)
    measured = _at_work(lens, metric, result)
    for indices in batches:
        _forward(lens, batch_of(lens, texts, indices), [measured], measured.sink_position)
    _raise_failures(result)


def gather_losses(
    lens: HookedTransformer,
    texts: Sequence[Tokens],
    metric: CausalMetric[Any],
    batches: Sequence[Sequence[int]],
) -> None:
    """Run one causal metric's conditions outside of a run, after `gather` has shown it the unedited model.

    Raises:
        MetricError: what the metric raised, with its traceback.
    """
    _require_fed(lens, texts, metric, CausalMetric, batches)
    result = MetricResult(type(metric), metric.params, "")
    intervene(lens, texts, batches, [Measured(metric, result)], Interventions(bos=lens.bos))
    _raise_failures(result)


def _require_fed(lens: Any, texts: Any, metric: Any, kind: type, batches: Any) -> None:
    """InputError unless `metric` can be fed with the texts in these batches."""
    require_lens("lens", lens)
    require_kind("metric", metric, kind, "made for the lens")
    for name, listed in (("texts", texts), ("batches", batches)):
        if not is_list_like(listed, Collection):
            raise InputError(f"expected {name} as a list, received {short_form(listed)}")
    for text in texts:
        require_kind("each of texts", text, Tokens, "from lens.encoder().tokens(text, n)")
    for indices in batches:
        require_wholes("each of batches", indices, 0)


def _at_work(lens: HookedTransformer, metric: Metric[Any], result: MetricResult) -> Measured:
    require_constructed(metric)
    points = _points(lens, hook_names(metric))
    return Measured(metric, result, points, metric.sink_position, metric.n_distances)


def _raise_failures(result: MetricResult) -> None:
    for failure in result.failures:
        raise MetricError(f"{failure}\n{failure.traceback}")


def _points(lens: HookedTransformer, names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Whole hook names, `{layer}` filled in, with the layer and the name in it; InputError for unknown
    ones."""
    points: dict[str, tuple[int | None, str]] = {}
    for pattern in names:
        layers = range(lens.info.n_layers) if "{layer}" in pattern else range(1)
        for layer in layers:
            name = pattern.replace("{layer}", str(layer))
            lens.require_hook(name)
            inside = _IN_LAYER.fullmatch(name)
            points[name] = (int(inside[1]), inside[2]) if inside else (None, name)
    return points


def _passes(at_work: Sequence[Measured]) -> dict[int, list[Measured]]:
    """Metrics by the sink position they need; those that hook no `hook_sink` ride along with the first."""
    passes: dict[int, list[Measured]] = {}
    anywhere = []
    for measured in at_work:
        if not measured.points:
            continue  # a causal metric that needs no look at the unedited model
        if any(name.endswith(".hook_sink") for name in measured.points):
            passes.setdefault(measured.sink_position, []).append(measured)
        else:
            anywhere.append(measured)
    if anywhere:
        passes.setdefault(next(iter(passes), 0), []).extend(anywhere)
    return passes


def _forward(lens: HookedTransformer, batch: Batch, members: Sequence[Measured], sink_position: int) -> None:
    """One batch through the model; every metric that still works is handed its layers."""
    import torch

    working = [measured for measured in members if measured.works]
    names = {name: None for measured in working for name in measured.points}
    if not names:
        return
    layers = _Layers(lens, batch, working)
    with torch.no_grad():
        with memory_named(lens, batch):
            lens.stream(
                batch.tokens,
                [(name, layers.catcher(name)) for name in names],
                lengths=batch.lengths_on(lens.device),
                sink_position=sink_position,
                n_distances=max(measured.n_distances for measured in working),
                unembed=any(name.startswith("unembed.") for name in names),
                reads_only=True,  # metrics get copies
            )
        layers.hand_out()
    layers.require_all(names)


class _Layers:
    """Holds the activations of one layer, hands each metric its own as soon as all have come, and lets go of them."""

    def __init__(self, lens: HookedTransformer, batch: Batch, members: Sequence[Measured]) -> None:
        self._lens = lens
        self._members = members
        self._layer: int | None = None
        #: Each metric has the batch's tensors to itself.
        self._batches = {id(measured): batch.apart() for measured in members}
        self._held: dict[str, Tensor] = {}
        self._fired: set[str] = set()
        self._points = {name: at for measured in members for name, at in measured.points.items()}
        #: Who waits for which points, by layer; a point outside of all layers is a place of its own.
        self._waiting: dict[int | str, list[tuple[Measured, frozenset[str]]]] = {}
        for measured in members:
            wanted: dict[int | str, set[str]] = {}
            for name in measured.points:
                wanted.setdefault(self._place_of(name), set()).add(name)
            for place, names in wanted.items():
                self._waiting.setdefault(place, []).append((measured, frozenset(names)))

    def _place_of(self, name: str) -> int | str:
        layer, _ = self._points[name]
        return name if layer is None else layer

    def catcher(self, name: str) -> Callable[[Tensor, Any], None]:
        """The function to hook on the point `name`."""
        layer, place = self._points[name][0], self._place_of(name)

        def catch(tensor: Tensor, hook: Any) -> None:
            if layer is not None and layer != self._layer:
                self.hand_out()
                self._layer = layer
            self._held[name] = tensor
            self._fired.add(name)
            self._hand_out_complete(place)

        return catch

    def _hand_out_complete(self, place: int | str) -> None:
        """Serve whoever has all that it waits for, and keep only what others still wait for."""
        waiting = self._waiting.get(place, [])
        complete = [each for each in waiting if each[1] <= self._held.keys()]
        if complete:
            waiting[:] = [each for each in waiting if not each[1] <= self._held.keys()]
            for measured, names in complete:
                self._give(measured, names)
            still = {name for _, names in waiting for name in names}
            self._held = {name: tensor for name, tensor in self._held.items() if name in still}

    def hand_out(self) -> None:
        """The layer is over: whoever still waits gets what has come of it."""
        if self._layer is not None:
            for measured, names in self._waiting.pop(self._layer, []):
                self._give(measured, names & self._held.keys())
        self._held = {}

    def _give(self, measured: Measured, names: Collection[str]) -> None:
        # In the order in which they fired; a set has none.
        mine = {measured.points[name][1]: tensor for name, tensor in self._held.items() if name in names}
        if mine and measured.works:
            layer = next(measured.points[name][0] for name in names)
            weight = functools.partial(weight_of, self._lens, layer)
            projection = functools.partial(projection_of, self._lens, layer)
            with guarded(measured.result, measured.metric.model.label, "update"):
                view = LayerView(layer, self._batches[id(measured)], mine, weight, projection)
                measured.metric.update(view)

    def require_all(self, names: Mapping[str, None]) -> None:
        """A point that exists but did not fire is a failure of the metrics that hooked it, not a missing
        value."""
        for measured in self._members:
            silent = [name for name in measured.points if name not in self._fired]
            if silent and measured.works:
                with guarded(measured.result, measured.metric.model.label, "update"):
                    raise InputError(f"hook point {silent[0]!r} did not fire in this model's forward")


def _not_finite(tables: Mapping[str, Table]) -> list[str]:
    return [
        f"table {name}, column {column}: {count} values were NaN or infinite, shown as null"
        for name, table in tables.items()
        for column, count in table.not_finite.items()
    ]
