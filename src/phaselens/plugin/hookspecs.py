"""The hooks that a plugin module may implement, each marked with `phaselens.plugin.hookimpl`.

A hook may gain arguments from one version to the next, and never loses one; an implementation takes those it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from phaselens.plugin.offers import NamedModel, NamedTexts

if TYPE_CHECKING:
    import click
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
def phaselens_models() -> Sequence[NamedModel]:  # type: ignore[empty-body]
    """Return models that `phaselens run` then accepts by name, each with the function that loads it."""


@hookspec
def phaselens_texts() -> Sequence[NamedTexts]:  # type: ignore[empty-body]
    """Return sets of texts that `--texts` then accepts by name, each with the function that reads it."""


@hookspec
def phaselens_commands(cli: click.Group) -> None:
    """Add a command to `cli`, the group of commands; it becomes `phaselens NAME`."""


@hookspec
def phaselens_run_finished(run: FinishedRun) -> None:
    """Called when a run that used this plugin is over and its tables are complete. `run` is a copy: what is changed in
    it changes no result."""
