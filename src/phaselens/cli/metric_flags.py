"""A command with one option for each parameter of the metrics that -p names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from phaselens.cli.metric_names import metrics_named
from phaselens.plugin import Metric, ParamSpec, plugins

_KEY = "phaselens.flags"
_NAMES = "phaselens.metric_names"


@dataclass
class MetricFlags:
    """Flags of the selected metrics.

    `targets` maps an option's Python name to its metric and parameter. `shared` maps a flag that several metrics have,
    and that therefore sets none of them, to the `metric.parameter` of each.
    """

    options: list[click.Option] = field(default_factory=list)
    targets: dict[str, tuple[str, str]] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def for_metrics(cls, metrics: Sequence[type[Metric[Any]]], reserved: Iterable[str]) -> MetricFlags:
        """Make the flags of `metrics`. A parameter whose flag is in `reserved` is set by -P only."""
        flags, used = cls(), set(reserved)
        owners: dict[str, list[tuple[str, ParamSpec]]] = {}
        for metric in metrics:
            for spec in metric.Params.specs():
                owners.setdefault(spec.flag, []).append((metric.name, spec))
        for flag, specs in owners.items():
            if len(specs) > 1:
                flags.shared[flag] = [f"{name}.{spec.name}" for name, spec in specs]
            elif flag not in used:
                name, spec = specs[0]
                variable = f"parameter_{len(flags.options)}"
                flags.options.append(_option(variable, name, spec))
                flags.targets[variable] = (name, spec.name)
        return flags

    def values(self, arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Take the parameters set by flags out of `arguments`, and return them by metric."""
        parameters: dict[str, dict[str, Any]] = {}
        for variable, (metric, name) in self.targets.items():
            value = arguments.pop(variable, None)
            if value is not None:
                parameters.setdefault(metric, {})[name] = value
        return parameters


class MetricCommand(click.Command):
    """A command that looks for -p before it parses, so that the parameters of those metrics are flags in --help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the metrics in `args`, then parse with their flags."""
        in_files = [name for path in _values(args, "--plugin-file") for name in plugins().add_file(path)]
        names = ctx.meta[_NAMES] = metrics_named(_values(args, "--plugin", "-p")) or in_files
        metrics = [plugins().metric(name) for name in names]
        reserved = {opt for param in super().get_params(ctx) for opt in (*param.opts, *param.secondary_opts)}
        flags = ctx.meta[_KEY] = MetricFlags.for_metrics(metrics, reserved)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = flags.shared.get(error.option_name)
            if owners:
                alternatives = " or ".join(f"-P {owner}=VALUE" for owner in owners)
                raise click.UsageError(
                    f"{error.option_name} is a parameter of several metrics; write {alternatives}"
                ) from error
            if not metrics:
                hint = f"no such option: {error.option_name}; to set an option of a metric, add -p NAME"
                raise click.UsageError(hint) from error
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters and those of the metrics."""
        return [*super().get_params(ctx), *metric_flags(ctx).options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the parameters of each metric in a separate section."""
        flags = metric_flags(ctx)
        own_records = [
            param.get_help_record(ctx) for param in super().get_params(ctx) if isinstance(param, click.Option)
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own_records if record is not None])
        for metric in dict.fromkeys(metric for metric, _ in flags.targets.values()):
            options = [option for option in flags.options if flags.targets[str(option.name)][0] == metric]
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(f"Parameters of {metric} (also -P {metric}.NAME=VALUE)"):
                formatter.write_dl([record for record in records if record is not None])


def metric_flags(ctx: click.Context) -> MetricFlags:
    """Return the flags of this invocation's metrics."""
    flags = ctx.meta.get(_KEY)
    return flags if isinstance(flags, MetricFlags) else MetricFlags()


def chosen_metrics(ctx: click.Context) -> list[str]:
    """Return the names of the metrics from -p, or else of those from --plugin-file."""
    return list(ctx.meta.get(_NAMES, []))


def _option(variable: str, metric: str, spec: ParamSpec) -> click.Option:
    unit = f" [{spec.unit}]" if spec.unit else ""
    default = spec.default
    if spec.type is bool and not spec.optional:
        negative = "--no-" + spec.flag.removeprefix("--")
        text = f"{spec.help}{unit} (default: {'on' if default else 'off'})"
        return click.Option([variable, f"{spec.flag}/{negative}"], default=None, help=text)
    metavar = (
        "|".join(spec.choices) if spec.choices else {int: "INTEGER", float: "NUMBER"}.get(spec.type, "TEXT")
    )
    allowed = "" if spec.choices else f"; {spec.allowed}"
    text = f"{spec.help}{unit} (default: {default}{allowed})"
    return click.Option([variable, spec.flag], default=None, metavar=metavar, help=text)


def _values(args: Sequence[str], long_name: str, short_name: str | None = None) -> list[str]:
    """Return the values of an option in `args`, before click has parsed them."""
    values, remaining = [], iter(args)
    for arg in remaining:
        if arg == "--":
            break
        if arg in (long_name, short_name):
            values.append(next(remaining, ""))
        elif arg.startswith(f"{long_name}="):
            values.append(arg.removeprefix(f"{long_name}="))
        elif short_name and arg.startswith(short_name) and not arg.startswith("--"):
            values.append(arg[2:].removeprefix("="))
    return values
