"""The checks of edits: they reach what is above them and nothing below, and a forward can start at any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.lens.captures import capture, keeper, per_layer
from phaselens.lens.check_results import CheckResult, difference, worst
from phaselens.lens.points import in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer
    from phaselens.lens.points import Hook


@dataclass(frozen=True)
class CleanForward:
    """A forward without edits, which all checks of edits compare with.

    `inputs` are what entered each layer that has the point, `outputs` what the checked layers and the last returned.
    """

    tokens: Tensor
    final: Tensor
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]


def clean_forward(lens: HookedTransformer, tokens: Tensor, layers: list[int]) -> CleanForward:
    """Run the forward that the checks of these layers compare with."""
    inputs = {("in", layer): name for layer, name in per_layer(lens, "hook_in").items()}
    outputs = {("out", layer): in_layer(layer, "hook_out") for layer in {*layers, lens.info.n_layers - 1}}
    final, states = capture(lens, tokens, {**inputs, **outputs})
    by_side = {
        side: {layer: state for (point, layer), state in states.items() if point == side}
        for side in ("in", "out")
    }
    return CleanForward(tokens, final, by_side["in"], by_side["out"])


def run_layer(lens: HookedTransformer, clean: CleanForward, layer: int, hooks: Sequence[Hook]) -> None:
    """Run one layer with hooks on what entered it in the clean forward, and those below it only if it needs them."""
    if lens.resume_problem is None and layer in clean.inputs:
        lens.stream(residual=clean.inputs[layer], start_at_layer=layer, stop_at_layer=layer + 1, hooks=hooks)
    else:
        lens.stream(clean.tokens, hooks, stop_at_layer=layer + 1)


def edit_changes_layers_above(lens: HookedTransformer, clean: CleanForward, layers: list[int]) -> CheckResult:
    """Change the first value (or another output) of a layer: the input of layers up to it stays bit-equal, and its own
    output changes."""
    last = lens.info.n_layers - 1
    points: dict[int, str] = {**per_layer(lens, "hook_in"), last + 1: in_layer(last, "hook_out")}
    before = {**clean.inputs, last + 1: clean.outputs[last]}
    moved: dict[int, float] = {}
    for layer in layers:
        edited_point = next(
            (
                name
                for point in ("attn.hook_v", "attn.hook_attended", "hook_mixer_out", "hook_mlp_out")
                if lens.find_hook(name := in_layer(layer, point)) is not None
            ),
            None,
        )
        if edited_point is None:
            continue

        residual_size = before[layer].abs().max()

        def raise_first(value: Tensor, hook: object, step: Tensor = residual_size) -> Tensor:
            value = value.clone()
            value[:, 0] += step.to(value)  # a smaller step may be lost to rounding beside the residual
            return value

        edited: dict[int, Tensor] = {}
        hooks = [(name, keeper(edited, key)) for key, name in points.items()]
        end = min(layer + 2, last + 1)
        lens.stream(clean.tokens, [*hooks, (edited_point, raise_first)], stop_at_layer=end)
        gap_below = max(difference(edited[index], before[index]) for index in range(layer + 1))
        above = layer + 1 if layer + 1 in before else last + 1
        # Where NaN weights left nothing finite, no edit can be detected.
        changed = difference(edited[above], before[above]) > 0 or not before[above].isfinite().any()
        moved[layer] = gap_below if changed else float("inf")
    return worst("an edit changes the layers above it and none below", 0.0, moved, "edit in layer")


def mid_edit_reaches_skip_path(
    lens: HookedTransformer, clean: CleanForward, layers: list[int]
) -> list[CheckResult]:
    """Set the mid residual to zero: the block's output must be the MLP's alone. A copy must change no bit."""
    gaps: dict[int, float] = {}
    limit = 0.0
    for layer in layers:
        block = lens.blocks[layer]
        points = ("hook_resid_mid", "hook_mlp_out")
        if any(block.find_point(point) is None for point in points) or not block.adds_mid_again():
            continue
        limit = limit if block.adds_mlp_out_exactly() else lens.arithmetic.limit
        block_output = in_layer(layer, "hook_out")
        mid = in_layer(layer, "hook_resid_mid")
        copied: dict[str, Tensor] = {}
        hooks = [(mid, lambda value, hook: value.clone()), (block_output, keeper(copied, "out"))]
        run_layer(lens, clean, layer, hooks)
        edited: dict[str, Tensor] = {}
        hooks = [
            (mid, lambda value, hook: torch.zeros_like(value)),
            (block_output, keeper(edited, "out")),
            (in_layer(layer, "hook_mlp_out"), keeper(edited, "mlp")),
        ]
        run_layer(lens, clean, layer, hooks)
        gaps[layer] = max(
            difference(copied["out"], clean.outputs[layer]), difference(edited["out"], edited["mlp"])
        )
    return [worst("an edit of hook_resid_mid reaches the skip path", limit, gaps)] if gaps else []


def resuming_gives_the_same(lens: HookedTransformer, clean: CleanForward, layers: list[int]) -> CheckResult:
    """Start at a layer, or above the last, from the residual: the result is the same, and no lower layer runs."""
    n_layers = lens.info.n_layers
    residuals = {**clean.inputs, n_layers: clean.outputs[n_layers - 1]}
    gaps: dict[int, float] = {}
    for layer in (*layers, n_layers):
        inputs_below: dict[int, Tensor] = {}
        hooks = [(in_layer(lower, "hook_in"), keeper(inputs_below, lower)) for lower in range(layer)]
        resumed = lens.stream(residual=residuals[layer], start_at_layer=layer, hooks=hooks)
        gaps[layer] = float("inf") if inputs_below else difference(resumed, clean.final)
    return worst("start_at_layer gives the same output and skips the layers below", 0.0, gaps)
