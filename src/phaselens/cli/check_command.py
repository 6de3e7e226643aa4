"""The command `phaselens check`."""

from __future__ import annotations

import sys
from typing import Any

import click

from phaselens.cli import shared_options
from phaselens.cli.streams import only_results_on_stdout
from phaselens.lens.info import ROTATION_MODES


@click.command()
@click.argument("model")
@click.option(
    "--positions",
    type=click.Choice(list(ROTATION_MODES)),
    default="auto",
    help="nope nulls the rotation.",
)
@shared_options.device
@shared_options.device_map
@shared_options.dtype
@shared_options.bos
@shared_options.adapter_scale
@shared_options.softmax_scale
@shared_options.rope_scaling
@shared_options.debug
def check(model: str, positions: str, device: str, dtype: str, bos: str, debug: bool, **scales: Any) -> int:
    """Check in every layer that the lens shows what MODEL computes. Exits with 3 if it does not.

    Also compares the model's loss on bundled texts with its rotation as configured and nulled: some models without
    positions come with a configuration that rotates.
    """
    from phaselens.report.numbers import significant
    from phaselens.report.terminal_layout import console, print_rows
    from phaselens.runs import ModelSpec, load_model

    spec = ModelSpec.parse(model)
    label = spec.label or spec.short
    softmax_scale = shared_options.one_softmax_scale(scales["softmax_scales"], label)
    rope_scaling = shared_options.one_model_value(scales["rope_scalings"], label, "--rope-scaling", "yarn:4")
    with only_results_on_stdout(debug=debug):
        from phaselens.lens import run_checks
        from phaselens.lens.nulled_loss import compare_nulled_loss

        lens = load_model(
            spec,
            label=spec.label,
            positions=positions,
            device=device,
            dtype=dtype,
            bos=bos,
            adapter_scale=shared_options.one_adapter_scale(scales["adapter_scales"]),
            softmax_scale=softmax_scale,
            rope_scaling=rope_scaling,
            device_map=scales["device_map"],
            check="report",
        )
        results = run_checks(lens)
        loss = compare_nulled_loss(lens)
    rows = [
        (
            "ok" if result.ok else "failed",
            result.name,
            significant(result.measured, 2),
            significant(result.limit, 2),
            result.detail,
        )
        for result in results
    ]
    print_rows(["", "check", "difference", "allowed", "where"], rows, console(sys.stdout), status_column=0)
    if isinstance(loss, str):
        click.echo(f"loss with the rotation nulled: not compared: {loss}")
    else:
        click.echo(loss)
        if loss.looks_like_nope:
            click.echo(
                "this looks like a NoPE model: it is better without its rotation, by "
                f"{loss.configured - loss.nulled:.3f} nats [{-loss.high:.3f}, {-loss.low:.3f}]; use --positions nope "
                "(in a run, --positions LABEL=nope)"
            )
    return 0 if all(result.ok for result in results) else 3
