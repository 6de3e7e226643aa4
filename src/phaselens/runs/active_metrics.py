"""Metrics that are running on one model, and the guard that isolates their failures."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from phaselens.errors import PhaseLensError, require_kind, require_text
from phaselens.plugin import Metric
from phaselens.plugin.author_errors import is_of_plugin, location_in_class, message_of
from phaselens.plugin.process_settings import preserved_settings
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.result import Failure, MetricResult


@dataclass
class ActiveMetric:
    """A metric that is running on one model. A metric that raises is dropped; its result records why.

    `points` maps the hook names that the metric reads to (layer, name within the layer). `has_values` is False where
    the model has none of them; the metric's tables are then empty, and its warnings say why.
    """

    metric: Metric[Any]
    result: MetricResult
    points: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    sink_position: int = 0
    n_distances: int = 1
    has_values: bool = True

    @property
    def works(self) -> bool:
        """Whether the metric has not failed on this model."""
        return not any(failure.model == self.metric.model.label for failure in self.result.failures)


@contextmanager
def guarded(result: MetricResult, label: str, stage: str) -> Iterator[None]:
    """Record an exception as a failure of the metric instead of ending the run, and restore process-wide settings.

    Args:
        result: the metric's result, which receives the failure.
        label: the model's label.
        stage: what the metric is doing, such as `update`.
    """
    require_kind("result", result, MetricResult, "of the metric that is guarded")
    require_text("label", label)
    require_text("stage", stage)
    try:
        with preserved_settings():
            yield
    except BatchTooLarge:
        raise
    except BaseException as error:  # it is recorded with its traceback and makes the run exit with 1
        if not is_of_plugin(error):
            raise
        full_traceback = "".join(traceback.format_exception(error))
        message = message_of(error)
        location = _location(error, result.metric)
        result.failures.append(Failure(label, stage, type(error).__name__, message, full_traceback, location))


def _location(error: BaseException, metric_class: type) -> str | None:
    """Return `file:line` in the metric's own file; None for a PhaseLens error that the metric raised on purpose."""
    is_finding = getattr(error, "is_finding", False)
    if isinstance(error, PhaseLensError) and (is_finding or not _raised_by_phaselens(error)):
        return None
    return getattr(error, "location", None) or location_in_class(error, metric_class)


def _raised_by_phaselens(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("phaselens.")
