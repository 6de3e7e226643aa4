"""The hooks that a plugin module may implement, each marked with `phaselens.plugin.hookimpl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import pyarrow as pa

    from phaselens.plugin.metric import Metric

hookspec = pluggy.HookspecMarker("phaselens")
hookimpl = pluggy.HookimplMarker("phaselens")


class FinishedRun(Protocol):
    """What a plugin may ask of a run that is over."""

    def table(self, metric: str, name: str) -> pa.Table:
        """A result table, for instance `run.table("sinks", "layers")`."""

    def to_dict(self) -> dict[str, Any]:
        """The whole run as plain JSON values, as `--format json` prints it."""


@hookspec
def phaselens_metrics() -> Sequence[type[Metric[Any]] | str]:  # type: ignore[empty-body]
    """Return the metrics that this plugin offers: classes, or `"module:Class"` strings loaded only when
    used."""


@hookspec
def phaselens_run_finished(run: FinishedRun) -> None:
    """Called when a run that used this plugin is over and its tables are complete."""
