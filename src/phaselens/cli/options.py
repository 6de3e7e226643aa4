"""Options that several commands share, and the reading of `LABEL=CHOICE` and `METRIC.PARAMETER=VALUE`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from phaselens.errors import InputError, close_matches

device = click.option(
    "--device", default="auto", metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:1."
)
dtype = click.option(
    "--dtype",
    default="auto",
    metavar="NAME",
    help="auto (the checkpoint's on a GPU, float32 on a CPU), float32, bfloat16, float16.",
)
bos = click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="BOS at position 0; auto: as the tokenizer does.",
)
debug = click.option("--debug", is_flag=True, help="Show tracebacks, and what libraries have to say.")

plugin_file = click.option(
    "--plugin-file",
    "files",
    multiple=True,
    metavar="FILE.py",
    help="Take the metrics of a file that is not installed; repeat.",
)

positions = click.option(
    "--positions",
    multiple=True,
    metavar="LABEL=auto|nope",
    help="nope nulls the rotation of that model; repeat.",
)

settings = click.option(
    "-P",
    "settings",
    multiple=True,
    metavar="METRIC.PARAMETER=VALUE",
    help="Set a metric's parameter; repeat.",
)


def split_names(values: Iterable[str]) -> list[str]:
    """Names given by repeated options or with commas between them, each once.

    >>> split_names(["sinks,other", "sinks"])
    ['sinks', 'other']
    """
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def by_label(values: Iterable[str]) -> dict[str, str]:
    """`LABEL=CHOICE` pairs."""
    pairs: dict[str, str] = {}
    for value in values:
        label, sign, choice = value.partition("=")
        if not sign or not label:
            raise InputError(f"--positions {value!r}: write LABEL=auto or LABEL=nope")
        pairs[label] = choice
    return pairs


def by_metric(values: Iterable[str], metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`METRIC.PARAMETER=VALUE` settings, by metric."""
    known = list(metrics)
    settings: dict[str, dict[str, Any]] = {name: {} for name in known}
    for value in values:
        target, sign, given = value.partition("=")
        metric, dot, name = target.partition(".")
        if not sign or not dot:
            raise InputError(f"-P {value!r}: write METRIC.PARAMETER=VALUE, such as -P {known[0]}.NAME=VALUE")
        if metric not in settings:
            raise InputError(f"-P {value!r}: {metric!r} is not in this run; {close_matches(metric, known)}")
        if name in settings[metric]:
            raise InputError(f"-P {value!r}: {target} is given twice; keep one")
        settings[metric][name] = given
    return settings


def merged(
    settings: Mapping[str, dict[str, Any]], flags: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Settings by -P and by flags together; InputError where both set the same parameter."""
    for metric, values in flags.items():
        for name in values:
            if name in settings[metric]:
                raise InputError(f"{metric}.{name} is set by -P and by its flag; keep one")
    return {metric: {**values, **flags.get(metric, {})} for metric, values in settings.items()}
