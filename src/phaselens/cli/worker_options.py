"""The options of `phaselens run` that distribute its work over processes, machines and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])

_NAMES = ("threads", "workers", "engine", "address", "shards", "phase")
_POSITIVE = click.IntRange(min=1)


def worker_options(command: F) -> F:
    """Add the options."""
    for option in reversed(
        [
            click.option(
                "--workers",
                type=_POSITIVE,
                metavar="N",
                help="Compute shards in this many processes, one per GPU or group of cores; Ray: actors.",
            ),
            click.option(
                "--threads",
                type=_POSITIVE,
                metavar="N",
                help="CPU threads of each process; default: all cores. Part of what a run is, as it changes rounding.",
            ),
            click.option(
                "--shards",
                metavar="PART/PARTS",
                help="Compute one part of the shards into --out, as a task of a job array; then phaselens merge.",
            ),
            click.option(
                "--phase",
                type=click.Choice(["observations", "conditions"]),
                help="Compute this phase of the part only.",
            ),
            click.option(
                "--engine",
                type=click.Choice(["processes", "ray"]),
                default="processes",
                help="Where workers run: on this machine, or as actors of a Ray cluster.",
            ),
            click.option("--address", metavar="ADDRESS", help="The address of a Ray cluster."),
        ]
    ):
        command = option(command)
    return command


def worker_choices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the options among a command's arguments."""
    return {name: arguments[name] for name in _NAMES}
