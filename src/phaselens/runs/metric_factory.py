"""New instances of a run's metrics on one model, empty or with a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phaselens.plugin import CausalMetric, Metric, ModelInfo, NestedState
from phaselens.plugin.return_checks import require_constructed, require_definition
from phaselens.plugin.states import overlaid
from phaselens.runs.result import MetricResult
from phaselens.runs.run_options import SelectedMetric


class MetricFactory:
    """Creates instances of the selected metrics for one model. It needs the model's facts, not its weights."""

    def __init__(
        self, model: ModelInfo, selected_metrics: Sequence[SelectedMetric], *, seed: int, bos: str
    ) -> None:
        self.model = model
        self.selected = {selected.name: selected for selected in selected_metrics}
        self._seed = seed
        self._bos = bos
        self._empty_states: dict[str, NestedState] = {}

    def new(self, name: str) -> Metric[Any]:
        """Return an instance that has seen no text."""
        selected = self.selected[name]
        metric = selected.metric(self.model, selected.params, self._seed)
        require_constructed(metric)
        if isinstance(metric, CausalMetric):
            metric.bos = self._bos
        return metric

    def require_definition(self, name: str) -> None:
        """Raise TypeError if the metric's `define` does not return text."""
        selected = self.selected[name]
        require_definition(selected.metric, selected.params)

    def empty_state(self, name: str) -> NestedState:
        """Return the state of an instance that has seen no text."""
        if name not in self._empty_states:
            self._empty_states[name] = NestedState(self.new(name).state())
        return self._empty_states[name]

    def with_state(self, name: str, state: Mapping[str, Any]) -> Metric[Any]:
        """Return an instance with this state."""
        metric = self.new(name)
        metric.load_state(state)
        return metric

    def with_changes(self, name: str, changed: Mapping[str, Any]) -> Metric[Any]:
        """Return an instance whose state differs from an empty one by these changes."""
        return self.with_state(name, overlaid(self.empty_state(name), changed))

    def empty_result(self, name: str) -> MetricResult:
        """Return a result without tables, which collects the failures of one piece of work."""
        selected = self.selected[name]
        return MetricResult(selected.metric, selected.params, selected.distribution)
