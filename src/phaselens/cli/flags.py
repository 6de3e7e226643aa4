"""A command whose options grow by the parameters of the metrics that -p names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from phaselens.cli.options import split_names
from phaselens.plugin import Metric, ParamSpec, plugins

_KEY = "phaselens.flags"
_FILES = "phaselens.in_files"


@dataclass
class MetricFlags:
    """Flags of the chosen metrics: `targets` maps an option's Python name to its metric and parameter,
    `shared` a flag that several metrics have (so that none gets it) to `metric.parameter` of each."""

    options: list[click.Option] = field(default_factory=list)
    targets: dict[str, tuple[str, str]] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: Sequence[type[Metric[Any]]], reserved: Iterable[str]) -> MetricFlags:
        """The flags of `metrics`; a flag in `reserved` is a parameter's only by -P."""
        flags, taken = cls(), set(reserved)
        owners: dict[str, list[tuple[str, ParamSpec]]] = {}
        for metric in metrics:
            for spec in metric.Params.specs():
                owners.setdefault(spec.flag, []).append((metric.name, spec))
        for flag, owned in owners.items():
            if len(owned) > 1:
                flags.shared[flag] = [f"{name}.{spec.name}" for name, spec in owned]
            elif flag not in taken:
                name, spec = owned[0]
                variable = f"parameter_{len(flags.options)}"
                flags.options.append(_option(variable, name, spec))
                flags.targets[variable] = (name, spec.name)
        return flags

    def values(self, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What was given by flags, by metric; taken out of `given`."""
        found: dict[str, dict[str, Any]] = {}
        for variable, (metric, name) in self.targets.items():
            value = given.pop(variable, None)
            if value is not None:
                found.setdefault(metric, {})[name] = value
        return found


class MetricCommand(click.Command):
    """Looks for -p before it parses, so that the named metrics' parameters are flags, and shown by --help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the metrics in `args`, then parse as usual."""
        in_files = [name for path in _values(args, "--plugin-file") for name in plugins().add_file(path)]
        metrics = [
            plugins().metric(name) for name in split_names(_values(args, "--plugin", "-p")) or in_files
        ]
        ctx.meta[_FILES] = in_files
        reserved = {opt for param in super().get_params(ctx) for opt in (*param.opts, *param.secondary_opts)}
        flags = ctx.meta[_KEY] = MetricFlags.of(metrics, reserved)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = flags.shared.get(error.option_name)
            if owners:
                ways = " or ".join(f"-P {owner}=VALUE" for owner in owners)
                raise click.UsageError(
                    f"{error.option_name} is a parameter of several metrics; write {ways}"
                ) from error
            if not metrics:
                hint = f"no such option: {error.option_name}; a metric's own options need -p NAME beside them"
                raise click.UsageError(hint) from error
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own, and the metrics'."""
        return [*super().get_params(ctx), *metric_flags(ctx).options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The metrics' parameters in a section of their own."""
        flags = metric_flags(ctx)
        own = [
            param.get_help_record(ctx) for param in super().get_params(ctx) if isinstance(param, click.Option)
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own if record is not None])
        for metric in dict.fromkeys(metric for metric, _ in flags.targets.values()):
            options = [option for option in flags.options if flags.targets[str(option.name)][0] == metric]
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(f"Parameters of {metric} (also -P {metric}.NAME=VALUE)"):
                formatter.write_dl([record for record in records if record is not None])


def metric_flags(ctx: click.Context) -> MetricFlags:
    """The flags that this invocation's metrics brought."""
    flags = ctx.meta.get(_KEY)
    return flags if isinstance(flags, MetricFlags) else MetricFlags()


def metrics_in_files(ctx: click.Context) -> list[str]:
    """Names of the metrics that --plugin-file brought."""
    return list(ctx.meta.get(_FILES, []))


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


def _values(args: Sequence[str], long: str, short: str | None = None) -> list[str]:
    """The values of an option in `args`, before click has parsed them."""
    values, rest = [], iter(args)
    for arg in rest:
        if arg == "--":
            break
        if arg in (long, short):
            values.append(next(rest, ""))
        elif arg.startswith(f"{long}="):
            values.append(arg.removeprefix(f"{long}="))
        elif short and arg.startswith(short) and not arg.startswith("--"):
            values.append(arg[2:].removeprefix("="))
    return values
