"""The mean gate of each head: the factor between what it reads and what the output projection receives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phaselens.plugin import LayerView, ModelInfo, in_layer
from phaselens_plugins._layer_metric import Quantity

if TYPE_CHECKING:
    from torch import Tensor

ATTENDED, Z = "attn.hook_attended", "attn.hook_z"
GATE = Quantity(
    "gate",
    "factor",
    "mean over all queries and dimensions of the gate that multiplies the head's output; 1 in a layer without a gate",
    "1: a head without a gate",
)


def gate_points(model: ModelInfo) -> list[str]:
    """Return the hook points that the gates are read from, in the layers that have one."""
    return [in_layer(layer, point) for layer in model.gates for point in (ATTENDED, Z)]


def has_other_step(model: ModelInfo, layer: int) -> bool:
    """Return whether a step that is not a gate, such as a norm, follows the heads of the layer."""
    steps = model.head_outputs
    return bool(steps) and layer not in model.gates and steps[layer] in ("scaled", "mixed")


def mean_gates(layer: LayerView, model: ModelInfo) -> Tensor:
    """Return the mean gate [batch, head] of the layer's heads; NaN where it cannot be read.

    Entries that a head reads as exactly 0 are left out: no factor can be read from them.
    """
    import torch

    index = layer.index or 0
    shape = (layer.batch.n, model.n_heads_in(index))
    if Z not in layer:
        value = torch.nan if has_other_step(model, index) else 1.0
        return torch.full(shape, value, dtype=torch.float64)
    attended, z = layer.float64(ATTENDED), layer.float64(Z)
    can_be_read = (attended != 0) & layer.batch.real.to(attended.device)[:, :, None, None]
    factors = torch.where(can_be_read, z / torch.where(can_be_read, attended, 1.0), 0.0)
    number = can_be_read.sum((1, 3))
    return torch.where(number > 0, factors.sum((1, 3)) / number, torch.nan)
