"""The command `phaselens hooks`."""

from __future__ import annotations

import sys

import click

from phaselens.cli import shared_options
from phaselens.cli.streams import only_results_on_stdout
from phaselens.errors import InputError, close_matches


@click.command()
@click.argument("model")
@click.argument("pattern", required=False)
@shared_options.device
@shared_options.dtype
@shared_options.debug
def hooks(model: str, pattern: str | None, device: str, dtype: str, debug: bool) -> None:
    """List the hook points of MODEL: name, shape, dtype, meaning. With PATTERN, only names that contain it."""
    from phaselens.lens.hooks import describe_absent
    from phaselens.report.terminal_layout import console, print_rows
    from phaselens.runs import ModelSpec, load_model

    spec = ModelSpec.parse(model)
    with only_results_on_stdout(debug=debug):
        lens = load_model(spec, label=spec.label, device=device, dtype=dtype, check=False)
        points, absent = lens.describe_hooks(), describe_absent(lens)
    rows = [
        (point.name, point.shape, point.dtype, point.meaning)
        for point in points
        if pattern is None or pattern in point.name
    ]
    if not rows:
        endings = {point.name.rpartition(".")[2] for point in points}
        raise InputError(f"no hook point contains {pattern!r}; {close_matches(str(pattern), endings)}")
    print_rows(["hook point", "shape", "dtype", "meaning"], rows, console(sys.stdout))
    reasons = [(name, reason) for name, reason in absent if pattern is None or pattern in name]
    if reasons:
        print_rows(["absent", "reason"], reasons, console(sys.stdout))
