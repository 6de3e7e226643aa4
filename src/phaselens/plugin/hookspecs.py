"""The hooks that a plugin module may implement, each marked with `phaselens.plugin.hookimpl`.

A new version may add arguments to a hook and never removes one; an implementation declares those that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from phaselens.plugin.metric import Metric
from phaselens.plugin.named_sources import NamedModel, NamedTexts

if TYPE_CHECKING:
    import click
    import pyarrow as pa

hookspec = pluggy.HookspecMarker("phaselens")
hookimpl = pluggy.HookimplMarker("phaselens")


class FinishedRun(Protocol):
    """A finished run, as a plugin sees it."""

    def table(self, metric: str, name: str) -> pa.Table:
        """Return a result table: `run.table("sinks", "layers")`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the whole run as plain JSON values, as `--format json` prints it."""


@hookspec
def phaselens_metrics() -> Sequence[type[Metric[Any]] | str]:  # type: ignore[empty-body]
    """Return the metrics that this plugin offers: classes, or strings `"module:Class"`, imported on first use."""


@hookspec
def phaselens_models() -> Sequence[NamedModel]:  # type: ignore[empty-body]
    """Return the models that `phaselens run` accepts by name, each with a function that loads it."""


@hookspec
def phaselens_texts() -> Sequence[NamedTexts]:  # type: ignore[empty-body]
    """Return the sets of texts that `--texts` accepts by name, each with a function that reads it."""


@hookspec
def phaselens_commands(cli: click.Group) -> None:
    """Add a command to the click group `cli`; it becomes `phaselens NAME`."""


@hookspec
def phaselens_run_finished(run: FinishedRun) -> None:
    """React to a run that used this plugin, once its tables are complete. `run` is a copy; changes to it have no effect
    on the results."""
