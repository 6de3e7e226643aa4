"""The hook points that a loaded model does not have, with the reason."""

from __future__ import annotations

import re

from phaselens.lens import HookedTransformer
from phaselens.lens.hooks import describe_absent
from phaselens.lens.points import declaration, in_layer

# Points of every layer for which a model with an adapter of TransformerLens states no reason.
_RESIDUALS = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")
# Not an absence: a mixer beside attention is what few models have.
_EXPECTED = "hook_mixer_out"
_LAYERS_AND_POINT = re.compile(r"blocks\.(\d+|\{[^}]*\})\.(.+)")


def absent_points(lens: HookedTransformer) -> dict[str, str]:
    """Return the reason for each hook point that the model lacks; the layers are named where it lacks it in some."""
    reasons: dict[str, str] = {}
    for name, reason in describe_absent(lens):
        match = _LAYERS_AND_POINT.fullmatch(name)
        layers, point = (match[1].strip("{}"), match[2]) if match else ("", name)
        if point != _EXPECTED:
            is_everywhere = layers in ("", f"0..{lens.info.n_layers - 1}")
            reasons[point if is_everywhere else f"{point} in layer {layers}"] = reason
    if not lens.info.kinds:
        for point in _RESIDUALS:
            if lens.find_hook(in_layer(0, point)) is None:
                declared = declaration(in_layer(0, point))
                reasons[point] = f"only {declared.exists_in} have it" if declared is not None else ""
    return reasons
