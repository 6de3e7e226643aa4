"""The checks of edits: they reach what is above them and nothing below, and a forward can start at any layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.lens.captures import capture, keeper, per_layer
from phaselens.lens.check_results import CheckResult, difference, worst
from phaselens.lens.points import in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer


def edit_changes_layers_above(lens: HookedTransformer, tokens: Tensor, layers: list[int]) -> CheckResult:
    """Change the first value (or another output) of a layer: the input of layers up to it stays bit-equal, and its own
    output changes."""
    points = {**per_layer(lens, "hook_in"), "out": in_layer(lens.info.n_layers - 1, "hook_out")}
    _, clean = capture(lens, tokens, points)
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

        residual_size = clean[layer].abs().max()

        def raise_first(value: Tensor, hook: object, step: Tensor = residual_size) -> Tensor:
            value = value.clone()
            value[:, 0] += step.to(value)  # a smaller step may be lost to rounding beside the residual
            return value

        edited: dict[int | str, Tensor] = {}
        hooks = [(name, keeper(edited, key)) for key, name in points.items()]
        end = min(layer + 2, lens.info.n_layers)
        lens.stream(tokens, [*hooks, (edited_point, raise_first)], stop_at_layer=end)
        gap_below = max(difference(edited[index], clean[index]) for index in range(layer + 1))
        point_above = layer + 1 if layer + 1 in clean else "out"
        # Where NaN weights left nothing finite, no edit can be detected.
        changed = (
            difference(edited[point_above], clean[point_above]) > 0 or not clean[point_above].isfinite().any()
        )
        moved[layer] = gap_below if changed else float("inf")
    return worst("an edit changes the layers above it and none below", 0.0, moved, "edit in layer")


def mid_edit_reaches_skip_path(
    lens: HookedTransformer, tokens: Tensor, layers: list[int]
) -> list[CheckResult]:
    """Set the mid residual to zero: the block's output must be the MLP's alone. A copy must change no bit."""
    gaps: dict[int, float] = {}
    limit = 0.0
    _, clean = capture(lens, tokens, {layer: in_layer(layer, "hook_out") for layer in layers})
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
        lens.stream(tokens, hooks, stop_at_layer=layer + 1)
        edited: dict[str, Tensor] = {}
        hooks = [
            (mid, lambda value, hook: torch.zeros_like(value)),
            (block_output, keeper(edited, "out")),
            (in_layer(layer, "hook_mlp_out"), keeper(edited, "mlp")),
        ]
        lens.stream(tokens, hooks, stop_at_layer=layer + 1)
        gaps[layer] = max(difference(copied["out"], clean[layer]), difference(edited["out"], edited["mlp"]))
    return [worst("an edit of hook_resid_mid reaches the skip path", limit, gaps)] if gaps else []


def resuming_gives_the_same(lens: HookedTransformer, tokens: Tensor, layers: list[int]) -> CheckResult:
    """Start at a layer, or above the last, from the residual: the result is the same, and no lower layer runs."""
    n_layers = lens.info.n_layers
    points = {**per_layer(lens, "hook_in"), n_layers: in_layer(n_layers - 1, "hook_out")}
    final, residuals = capture(lens, tokens, points)
    gaps: dict[int, float] = {}
    for layer in (*layers, n_layers):
        inputs_below: dict[int, Tensor] = {}
        hooks = [(in_layer(lower, "hook_in"), keeper(inputs_below, lower)) for lower in range(layer)]
        resumed = lens.stream(residual=residuals[layer], start_at_layer=layer, hooks=hooks)
        gaps[layer] = float("inf") if inputs_below else difference(resumed, final)
    return worst("start_at_layer gives the same output and skips the layers below", 0.0, gaps)
