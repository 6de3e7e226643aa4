"""The first pass of a run: one forward over the texts of one model feeds all metrics, layer by layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.data import TokenizedText, pack
from phaselens.errors import InputError, MetricError, is_list_like, require_kind, require_wholes, short_form
from phaselens.lens.info import require_lens
from phaselens.lens.points import depends_on_sink_position, in_each_layer, is_logits, layer_and_point
from phaselens.plugin import Batch, CausalMetric, LayerView, Metric, MetricWarning, Table
from phaselens.plugin.return_checks import hook_names, require_constructed, require_definition, tables_of
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch, out_of_memory_explained
from phaselens.runs.condition_passes import run_conditions
from phaselens.runs.observer import Observer
from phaselens.runs.result import MetricResult
from phaselens.runs.run_options import SelectedMetric
from phaselens.runs.sequences import DEFAULT_BATCH_TOKENS, SequencePlan, in_rotation_mode, plan_sequences
from phaselens.runs.weights import copied_projection, copied_weight

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


def measure(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    selected_metrics: Sequence[SelectedMetric],
    results: Mapping[str, MetricResult],
    *,
    batch_tokens: int,
    seed: int,
    observer: Observer,
    bos: str | None = None,
) -> tuple[dict[str, Mapping[str, Table]], list[MetricWarning]]:
    """Run all metrics on one model, and return their tables by metric and their warnings.

    Metrics with the same sink position share one pass over the texts. Causal metrics then share a second pass, in which
    every condition branches off the baseline.
    """
    active_metrics: list[ActiveMetric] = []
    for selected in selected_metrics:
        with guarded(results[selected.name], lens.info.label, "construct"):
            # First, so that no metric is constructed from parameters that it cannot define.
            require_definition(selected.metric, selected.params)
            metric = selected.metric(lens.info, selected.params, seed)
            active_metrics.append(_activate(lens, metric, results[selected.name]))
    plans = _sequence_plans(lens, active_metrics, tokenized_texts, range(len(tokenized_texts)), batch_tokens)
    passes = _passes([active for active in active_metrics if active.metric.name not in plans])
    batches = pack([len(text.ids) for text in tokenized_texts], batch_tokens)
    n_tokens = len(passes) * sum(len(text.ids) for text in tokenized_texts)
    n_tokens += sum(plan.n_tokens for _, plan in plans.values())
    if n_tokens:
        observer.measuring(lens.info.label, n_tokens)
    for sink_position, members in passes.items():
        for indices in batches:
            _forward(lens, make_batch(lens, tokenized_texts, indices), members, sink_position)
            observer.advance(sum(len(tokenized_texts[index].ids) for index in indices))
    for active, plan in plans.values():
        _read_sequences(lens, active, plan, observer)
    run_conditions(
        lens,
        tokenized_texts,
        batches,
        active_metrics,
        bos=bos or lens.bos,
        observer=observer,
        batch_tokens=batch_tokens,
    )
    tables: dict[str, Mapping[str, Table]] = {}
    warnings: list[MetricWarning] = []
    for active in active_metrics:
        metric = active.metric
        if active.works:
            with guarded(active.result, lens.info.label, "compute"):
                tables[metric.name] = tables_of(metric)
                for message in _non_finite_warnings(tables[metric.name]):
                    metric.warn(message)
        prefix = f"{metric.name}: {lens.info.label}"
        warnings.extend(MetricWarning(warning).prefixed(prefix) for warning in metric.warnings)
    return tables, warnings


def feed_metric(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: Metric[Any],
    batches: Sequence[Sequence[int]],
) -> None:
    """Feed one metric outside of a run, without computing its tables; `batches` are indices of `tokenized_texts`.

    The conditions of a causal metric are not run; `feed_losses` does that.

    Raises:
        MetricError: with the traceback, if the metric raises.
    """
    _require_feedable(lens, tokenized_texts, metric, Metric, batches)
    result = MetricResult(type(metric), metric.params, "")
    require_definition(type(metric), metric.params)
    active = _activate(lens, metric, result)
    fed = sorted(index for indices in batches for index in indices)
    plans = _sequence_plans(lens, [active], tokenized_texts, fed)
    for _, plan in plans.values():
        _read_sequences(lens, active, plan, Observer())
    for indices in [] if plans else batches:
        _forward(lens, make_batch(lens, tokenized_texts, indices), [active], active.sink_position)
    _raise_failures(result)


def feed_losses(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: CausalMetric[Any],
    batches: Sequence[Sequence[int]],
) -> None:
    """Run one causal metric's conditions outside of a run, after `feed_metric` has fed it the unedited model.

    Raises:
        MetricError: with the traceback, if the metric raises.
    """
    _require_feedable(lens, tokenized_texts, metric, CausalMetric, batches)
    result = MetricResult(type(metric), metric.params, "")
    run_conditions(lens, tokenized_texts, batches, [ActiveMetric(metric, result)], bos=lens.bos)
    _raise_failures(result)


def _require_feedable(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: Metric[Any],
    metric_class: type,
    batches: Sequence[Sequence[int]],
) -> None:
    """Raise InputError unless `metric` can be fed with the texts in these batches."""
    require_lens("lens", lens)
    require_kind("metric", metric, metric_class, "made for the lens")
    for name, values in (("tokenized_texts", tokenized_texts), ("batches", batches)):
        if not is_list_like(values, Collection):
            raise InputError(f"expected {name} as a list, received {short_form(values)}")
    for text in tokenized_texts:
        require_kind("each of tokenized_texts", text, TokenizedText, "from lens.encoder().tokenize(text, n)")
    for indices in batches:
        require_wholes("each of batches", indices, 0)


def _activate(lens: HookedTransformer, metric: Metric[Any], result: MetricResult) -> ActiveMetric:
    require_constructed(metric)
    points = _points(lens, hook_names(metric))
    return ActiveMetric(metric, result, points, metric.sink_position, metric.n_distances)


def _raise_failures(result: MetricResult) -> None:
    for failure in result.failures:
        raise MetricError(f"{failure}\n{failure.traceback}")


def _points(lens: HookedTransformer, patterns: Sequence[str]) -> dict[str, tuple[int | None, str]]:
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


def _passes(active_metrics: Sequence[ActiveMetric]) -> dict[int, list[ActiveMetric]]:
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


def _sequence_plans(
    lens: HookedTransformer,
    active_metrics: Sequence[ActiveMetric],
    tokenized_texts: Sequence[TokenizedText],
    indices: Sequence[int],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> dict[str, tuple[ActiveMetric, SequencePlan]]:
    """Return the metrics that read sequences of their own, and these sequences, by the metric's name.

    `indices` are those of the texts from which a metric may make sequences.
    """
    plans = {}
    for active in active_metrics:
        if indices and active.points and active.metric.reads_own_sequences():
            with guarded(active.result, lens.info.label, "sequences"):
                plan = plan_sequences(lens, active.metric, tokenized_texts, indices, batch_tokens)
                if plan is not None:
                    plans[active.metric.name] = active, plan
    return plans


def _read_sequences(
    lens: HookedTransformer, active: ActiveMetric, plan: SequencePlan, observer: Observer
) -> None:
    """Pass the sequences of one metric through the model."""
    for mode, batches in itertools.groupby(plan.batches(), key=lambda entry: entry[1]):
        with guarded(active.result, lens.info.label, "sequences"), in_rotation_mode(lens, mode):
            for indices, _ in batches:
                with plan.segmented(lens, indices):
                    _forward(lens, make_batch(lens, plan.tokenized, indices), [active], active.sink_position)
                observer.advance(sum(len(plan.tokenized[index].ids) for index in indices))


def _forward(
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


def _non_finite_warnings(tables: Mapping[str, Table]) -> list[str]:
    return [
        f"table {name}, column {column}: {count} values were NaN or infinite, shown as missing"
        for name, table in tables.items()
        for column, count in table.not_finite.items()
    ]
