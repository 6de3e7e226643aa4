"""The final norm as a linear map, its statistic held fixed, measured from the norm's own output and gradient.

A norm divides what enters it by one number s(x) (RMSNorm, and LayerNorm after subtracting the mean), so that with s
held fixed it is linear in x: N(x) = A x + b. Of the true derivative dN = A − n x̃ᵀ k, with n = N(x) − b and x̃ what s is
computed of, only the second part is due to s. The number k follows from dN along x̃, because A x̃ = n.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens.blocks import original_module

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_SHIFT = 8.0
_SAME = 1e-2
"""Largest relative change by which a norm that subtracts the mean may answer to a shift: rounding alone."""
_TOLERANCE = 1e-4
"""Allowed distance of the linear map from the norm's own output, relative to the sizes of its terms; norms compute in
float32 in most models, whatever the model's dtype."""


def frozen_final_norm(lens: HookedTransformer, residual: Tensor, output: Tensor) -> tuple[Tensor, float]:
    """Return what each dimension of the residual adds to `output` · N(residual), and the part of the norm's bias.

    Args:
        lens: the model.
        residual: [d_model], what enters the final norm.
        output: [d_model], a direction in the norm's output.

    Returns:
        (direction [d_model], float64; constant): `direction` · residual + constant is `output` · N(residual), and a
        part of the residual adds `direction` · part, with the norm's divisor held at its value for the residual.

    Raises:
        RefusedModel: for a final norm that divides by no single number.
    """
    output = output.double()
    if "ln_final" not in lens._modules:
        return output, 0.0
    dtype = torch.promote_types(lens.dtype, torch.float32)
    norm = deepcopy(original_module(lens.ln_final)).to(dtype)
    with torch.enable_grad():
        entering = residual.detach().to(dtype)[None, None].requires_grad_()
        normed = norm(entering)
        with torch.no_grad():
            bias = norm(torch.zeros_like(entering)).double()[0, 0]
            scale = float(entering.double().square().mean().sqrt())
            shifted = norm(entering + _SHIFT * scale).double()[0, 0]
        outputs = output.to(normed), (normed.detach()[0, 0].double() - bias).to(normed)
        gradients = [
            torch.autograd.grad((direction * normed).sum(), entering, retain_graph=True)[0][0, 0].double()
            for direction in outputs
        ]
    after = normed.detach().double()[0, 0]
    before = entering.detach().double()[0, 0]
    is_centred = float((shifted - after).abs().max()) <= _SAME * float(after.abs().max())
    varying = before - before.mean() if is_centred else before
    change = after - bias
    size, square = float(change.square().sum()), float(varying.square().sum())
    if not size > 0 or not square > 0:
        raise RefusedModel(
            f"{lens.info.label}: the final norm returns nothing but its bias, so nothing is attributed"
        )
    factor = (1.0 - float(gradients[1] @ varying) / size) / square
    along = float(output @ change)
    direction = gradients[0] + varying * along * factor
    gap = abs(float(direction @ before) - along)
    if not gap <= _TOLERANCE * float(direction.abs() @ before.abs()):
        raise RefusedModel(
            f"{lens.info.label}: its final norm does not divide by one number, so that parts of the residual do not "
            "add up to a logit"
        )
    return direction, float(output @ bias)
