"""What metrics collected in one shard, and its merging with that of other shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import Metric, NestedState
from phaselens.plugin.author_errors import author_error, source_location
from phaselens.plugin.states import changes, is_generator, overlaid
from phaselens.runs.active_metrics import guarded
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.result import Failure, MetricResult


@dataclass(frozen=True)
class ShardPart:
    """What one metric collected in one shard: an instance that has seen it, or the changes of its state, or a failure.

    The changes are relative to the state before the shard: that of an empty instance, or after the conditions were
    chosen. `is_halved` says that memory ran out, so that the shard was read in batches of half the size.
    """

    metric: Metric[Any] | None = None
    changed: NestedState | None = None
    failure: Failure | None = None
    is_halved: bool = False


class PartsMerger:
    """Merges the parts of one metric, which must be added in the order of the shards.

    Args:
        factory: creates the instances.
        name: the metric's name.
        prepared: the state before the first shard, where that is not the empty one.
    """

    def __init__(self, factory: MetricFactory, name: str, prepared: NestedState | None = None) -> None:
        self._factory = factory
        self._name = name
        self._prepared = prepared
        self._only: ShardPart | None = None
        self._merged: Metric[Any] | None = None

    def add(self, part: ShardPart) -> None:
        """Merge a part, which is not a failure."""
        if self._merged is None and self._only is None:
            self._only = part
            return
        if self._merged is None and self._only is not None:
            # Not before the second part, so that a metric without `merge` can measure one shard.
            self._merged = self._before_first()
            self._merge(self._merged, self._only, is_first=True)
            self._only = None
        if self._merged is not None:
            self._merge(self._merged, part)

    def finish(self) -> Metric[Any]:
        """Return an instance that has everything."""
        if self._merged is not None:
            return self._merged
        if self._only is None:
            return self._before_first()
        if self._only.metric is not None:
            return self._only.metric
        return self._factory.with_state(self._name, overlaid(self._state_before(), self._only.changed or {}))

    def _state_before(self) -> NestedState:
        return self._factory.empty_state(self._name) if self._prepared is None else self._prepared

    def _before_first(self) -> Metric[Any]:
        if self._prepared is None:
            return self._factory.new(self._name)
        return self._factory.with_state(self._name, self._prepared)

    def _merge(self, merged: Metric[Any], part: ShardPart, *, is_first: bool = False) -> None:
        metric = part.metric
        if part.changed is not None:
            metric = self._factory.with_changes(self._name, part.changed)
        assert metric is not None
        collected: set[str] = set()
        if is_first:
            with contextlib.suppress(TypeError):  # a state that cannot be stored cannot be compared either
                collected = _changed_names(metric.state(), self._factory.empty_state(self._name))
        merged.merge(metric)
        if collected:
            _require_merged(merged, collected, self._state_before())


class ShardCollector:
    """Merges the parts of several metrics, shard by shard, and records failures in `results`.

    Args:
        factory: creates the metrics.
        names: the metrics' names.
        results: receives the failures.
        prepared: the metrics' states before the first shard; None where a metric is empty then.
    """

    def __init__(
        self,
        factory: MetricFactory,
        names: Iterable[str],
        results: Mapping[str, MetricResult],
        prepared: Mapping[str, NestedState | None] | None = None,
    ) -> None:
        self._label = factory.model.label
        self._results = results
        #: Number of shards that were read in batches of half the size.
        self.n_halved = 0
        self._mergers = {name: PartsMerger(factory, name, (prepared or {}).get(name)) for name in names}

    @property
    def working(self) -> list[str]:
        """Names of the metrics that have not failed so far."""
        return list(self._mergers)

    def add(self, parts: Mapping[str, ShardPart]) -> None:
        """Merge the parts of the next shard. A metric that failed in it, or that cannot be merged, is dropped."""
        self.n_halved += any(part.is_halved for part in parts.values())
        for name, part in parts.items():
            merger = self._mergers.get(name)
            if merger is None:
                continue  # it failed in an earlier shard
            result = self._results[name]
            n_failures = len(result.failures)
            if part.failure is not None:
                result.failures.append(part.failure)
            else:
                with guarded(result, self._label, "merge"):
                    merger.add(part)
            if len(result.failures) > n_failures:
                del self._mergers[name]

    def finish(self) -> dict[str, Metric[Any]]:
        """Return an instance of each metric that has what all shards gave; those that failed are missing."""
        metrics = {}
        for name, merger in self._mergers.items():
            with guarded(self._results[name], self._label, "merge"):
                metrics[name] = merger.finish()
        return metrics


def _changed_names(state: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    return {name for name, value in changes(state, before).items() if not is_generator(value)}


def _require_merged(merged: Metric[Any], collected: set[str], before: Mapping[str, Any]) -> None:
    """Raise TypeError if `merge` left out an attribute with collected values: tables would lack the other shards."""
    lost = sorted(collected - _changed_names(merged.state(), before))
    if lost:
        kind = type(merged)
        raise author_error(
            f"{kind.__name__} collects values in {', '.join(lost)}, which its merge leaves out; merge them too, or "
            "leave them out of the state by __getstate__ if they can be made again",
            source_location(kind.merge),
        )
