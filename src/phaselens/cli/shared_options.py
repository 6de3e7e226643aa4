"""Options shared by several commands, and parsers of `LABEL=CHOICE` and `METRIC.PARAMETER=VALUE`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from phaselens.data import BOS_POLICIES
from phaselens.errors import InputError, close_matches
from phaselens.lens.info import ROTATION_MODES
from phaselens.lens.scaling import ROPE_TYPES, RopeScaling, require_softmax_scale

#: Key of the command line among the data of a click context.
COMMAND_LINE = "phaselens.command_line"

device = click.option(
    "--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:1."
)
device_map = click.option(
    "--device-map",
    metavar="auto|FILE.json",
    help="Spread large models over GPUs, CPU and disk; FILE.json names the device of each module.",
)
dtype = click.option(
    "--dtype",
    default="auto",
    metavar="NAME",
    help="auto (the checkpoint's on a GPU, float32 on a CPU), float32, bfloat16, float16.",
)
bos = click.option(
    "--bos",
    type=click.Choice(list(BOS_POLICIES)),
    default="auto",
    help="BOS at position 0; auto: as the tokenizer does.",
)
debug = click.option("--debug", is_flag=True, help="Show tracebacks and messages of libraries.")

plugin_file = click.option(
    "--plugin-file",
    "files",
    multiple=True,
    metavar="FILE.py",
    help="Use the metrics of a file that is not installed; can be repeated.",
)

positions = click.option(
    "--positions",
    multiple=True,
    metavar=f"LABEL={'|'.join(ROTATION_MODES)}",
    help="nope nulls the rotation of that model; can be repeated.",
)

adapter_scale = click.option(
    "--adapter-scale",
    "adapter_scales",
    multiple=True,
    metavar="[LABEL=]NUMBER",
    help="Keep the adapter of BASE+ADAPTER apart and multiply it, by 0 (the base) to 1; default: merged.",
)

softmax_scale = click.option(
    "--softmax-scale",
    "softmax_scales",
    multiple=True,
    metavar="LABEL=NUMBER",
    help="The factor of q·k of that model, in place of its own; can be repeated.",
)

rope_scaling = click.option(
    "--rope-scaling",
    "rope_scalings",
    multiple=True,
    metavar=f"LABEL={'|'.join(ROPE_TYPES)}:FACTOR",
    help="Another rope type for that model, by transformers' own module; can be repeated.",
)

settings = click.option(
    "-P",
    "settings",
    multiple=True,
    metavar="METRIC.PARAMETER=VALUE",
    help="Set a metric's parameter; can be repeated.",
)


by = click.option(
    "--by",
    type=click.Choice(["label"]),
    help="Also group the texts by their labels (--label-field of the run).",
)


def split_names(values: Iterable[str]) -> list[str]:
    """Split names given by repeated options or separated by commas, and drop repetitions.

    >>> split_names(["sinks,other", "sinks"])
    ['sinks', 'other']
    """
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def by_label(values: Iterable[str], option: str = "--positions", forms: str = "") -> dict[str, str]:
    """Parse the `LABEL=CHOICE` pairs of an option; `forms` says how to write them.

    Raises:
        InputError: for a value without a label or without `=`.
    """
    forms = forms or " or ".join(f"LABEL={mode}" for mode in ROTATION_MODES)
    pairs: dict[str, str] = {}
    for value in values:
        label, sign, choice = value.partition("=")
        if not sign or not label:
            raise InputError(f"{option} {value!r}: write {forms}")
        pairs[label] = choice
    return pairs


def rope_scaling_by_label(values: Iterable[str]) -> dict[str, str]:
    """Parse `LABEL=TYPE:FACTOR` pairs; InputError for others."""
    scalings = by_label(values, "--rope-scaling", "LABEL=yarn:4")
    for scaling in scalings.values():
        RopeScaling.parse(scaling)
    return scalings


def softmax_scale_by_label(values: Iterable[str]) -> dict[str, float]:
    """Parse `LABEL=NUMBER` pairs; InputError for others.

    >>> softmax_scale_by_label(["a=0.125"])
    {'a': 0.125}
    """
    scales = {}
    for label, number in by_label(values, "--softmax-scale", "LABEL=NUMBER").items():
        try:
            scales[label] = float(number)
        except ValueError:
            raise InputError(f"--softmax-scale {label}={number}: write LABEL=NUMBER") from None
        require_softmax_scale(scales[label])
    return scales


def one_model_value(values: Iterable[str], label: str, option: str, example: str) -> str | None:
    """Return the value of an option for the one model of a command: `VALUE`, or `LABEL=VALUE` with the model's label.

    Raises:
        InputError: for several values, and for another label.

    >>> one_model_value(["yarn:4"], "tiny", "--rope-scaling", "yarn:4"), one_model_value(["tiny=2"], "tiny", "", "")
    ('yarn:4', '2')
    """
    given = list(values)
    if len(given) > 1:
        raise InputError(f"{option}: there is one model; give one value, such as {option} {example}")
    for value in given:
        name, sign, choice = value.partition("=")
        if sign and name != label:
            raise InputError(f"{option} {value!r}: the model is labelled {label!r}; write {option} {example}")
        return choice if sign else value
    return None


def one_softmax_scale(values: Iterable[str], label: str) -> float | None:
    """Parse the scale of a single model, or return None; InputError for what is not a number above 0."""
    value = one_model_value(values, label, "--softmax-scale", "0.125")
    return None if value is None else softmax_scale_by_label([f"{label}={value}"])[label]


def adapter_scale_by_label(values: Iterable[str]) -> float | dict[str, float] | None:
    """Parse `[LABEL=]NUMBER` values: one number for all models, or a number by label; None without any.

    Raises:
        InputError: for what is not a number, and for a number without a label beside others.

    >>> adapter_scale_by_label(["0.5"]), adapter_scale_by_label(["a=0", "b=1"])
    (0.5, {'a': 0.0, 'b': 1.0})
    """
    scales: dict[str, float] = {}
    for value in values:
        label, _, number = value.rpartition("=")
        try:
            scales[label] = float(number)
        except ValueError:
            raise InputError(
                f"--adapter-scale {value!r}: write a number from 0 to 1, or LABEL=NUMBER"
            ) from None
    if "" in scales and len(scales) > 1:
        raise InputError("--adapter-scale: give one number for all models, or LABEL=NUMBER for each")
    return scales.get("", scales or None)


def one_adapter_scale(values: Iterable[str]) -> float | None:
    """Parse the scale of a single model's adapter, or return None.

    Raises:
        InputError: for a label, which a single model does not need.
    """
    scale = adapter_scale_by_label(values)
    if isinstance(scale, dict):
        raise InputError("--adapter-scale: there is one model; write a number without a label")
    return scale


def by_metric(values: Iterable[str], metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parse `METRIC.PARAMETER=VALUE` settings, by metric.

    Raises:
        InputError: for a malformed setting, a metric that is not in `metrics`, or a parameter that is set twice.
    """
    metric_names = list(metrics)
    settings: dict[str, dict[str, Any]] = {name: {} for name in metric_names}
    for value in values:
        target, sign, text = value.partition("=")
        metric, dot, name = target.partition(".")
        if not sign or not dot:
            raise InputError(
                f"-P {value!r}: write METRIC.PARAMETER=VALUE, such as -P {metric_names[0]}.NAME=VALUE"
            )
        if metric not in settings:
            raise InputError(
                f"-P {value!r}: {metric!r} is not in this run; {close_matches(metric, metric_names)}"
            )
        if name in settings[metric]:
            raise InputError(f"-P {value!r}: {target} is given twice; keep one")
        settings[metric][name] = text
    return settings


def merge_settings(
    settings: Mapping[str, dict[str, Any]], flags: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Combine the settings of -P with those of flags.

    Raises:
        InputError: if both set the same parameter.
    """
    for metric, values in flags.items():
        for name in values:
            if name in settings[metric]:
                raise InputError(f"{metric}.{name} is set by -P and by its flag; keep one")
    return {metric: {**values, **flags.get(metric, {})} for metric, values in settings.items()}
