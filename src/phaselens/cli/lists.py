"""`phaselens hooks`, `phaselens check`."""

from __future__ import annotations

import sys

import click

from phaselens.cli import options
from phaselens.errors import InputError, close_matches


@click.command()
@click.argument("model")
@click.argument("pattern", required=False)
@options.device
@options.dtype
@options.debug
def hooks(model: str, pattern: str | None, device: str, dtype: str, debug: bool) -> None:
    """List the hook points of MODEL: name, shape, dtype, meaning. With PATTERN, only names that contain
    it."""
    from phaselens.cli.outcome import only_results_on_stdout
    from phaselens.report.tables import console, print_rows
    from phaselens.runs import ModelSpec, load_model

    spec = ModelSpec.parse(model)
    with only_results_on_stdout(debug=debug):
        lens = load_model(spec, label=spec.label, device=device, dtype=dtype, check=False)
        points = lens.describe_hooks()
    rows = [
        (point.name, point.shape, point.dtype, point.meaning)
        for point in points
        if pattern is None or pattern in point.name
    ]
    if not rows:
        last = {point.name.rpartition(".")[2] for point in points}
        raise InputError(f"no hook point contains {pattern!r}; {close_matches(str(pattern), last)}")
    print_rows(["hook point", "shape", "dtype", "meaning"], rows, console(sys.stdout))


@click.command()
@click.argument("model")
@click.option(
    "--positions", type=click.Choice(["auto", "nope"]), default="auto", help="nope nulls the rotation."
)
@options.device
@options.dtype
@options.debug
def check(model: str, positions: str, device: str, dtype: str, debug: bool) -> int:
    """Check MODEL in every layer: does the lens show what the model does? Exits with 3 where it does not."""
    from phaselens.cli.outcome import only_results_on_stdout
    from phaselens.lens import run_checks
    from phaselens.report.tables import console, print_rows
    from phaselens.runs import ModelSpec, load_model

    spec = ModelSpec.parse(model)
    with only_results_on_stdout(debug=debug):
        lens = load_model(
            spec, label=spec.label, positions=positions, device=device, dtype=dtype, check="report"
        )
        results = run_checks(lens)
    rows = [
        ("ok" if one.ok else "failed", one.name, f"{one.measured:.2g}", f"{one.limit:.2g}", one.detail)
        for one in results
    ]
    print_rows(["", "check", "difference", "allowed", "where"], rows, console(sys.stdout), marked=0)
    return 0 if all(one.ok for one in results) else 3
