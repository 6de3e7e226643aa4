"""The hook points that a loaded model does not have, with the reason."""

from __future__ import annotations

from phaselens.lens import HookedTransformer
from phaselens.lens.points import declaration, in_layer

# Points of every layer that TransformerLens users expect.
_IN_LAYERS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_sink",
    "attn.hook_pattern",
    "attn.hook_z",
)
_OUTSIDE = ("hook_embed", "ln_final.hook_scale")


def absent_points(lens: HookedTransformer) -> dict[str, str]:
    """Return, by the name of each absent hook point, where it is absent and why."""
    n_layers = lens.info.n_layers
    reasons: dict[str, str] = {}
    for point in _IN_LAYERS:
        layers = [layer for layer in range(n_layers) if lens.find_hook(in_layer(layer, point)) is None]
        if layers:
            where = "" if len(layers) == n_layers else f"layers {', '.join(map(str, layers))}: "
            reasons[point] = where + _reason(in_layer(layers[0], point))
    return reasons | {point: _reason(point) for point in _OUTSIDE if lens.find_hook(point) is None}


def _reason(name: str) -> str:
    declared = declaration(name)
    return (
        f"only {declared.exists_in} have it"
        if declared is not None and declared.exists_in
        else "not in this model"
    )
