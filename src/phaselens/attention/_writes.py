"""Norms of what attention heads write into the residual stream, without a tensor [pos, head, d_model].

Shapes: w_o [head, d_head, d_model], the output projection by head; z [pos, head, d_head], the heads' outputs before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.errors import InputError, require_tensor

_W_O = ("head", "d_head", "d_model")
_FACTOR = ("head", "row", "d_head")
_ROWS = 256
"""Tokens per product, so that they stay in a CPU's cache."""


def triangular(w_o: Tensor) -> Tensor:
    """Return R [head, d_head, d_head], float64, with ‖z W_O‖ = ‖R z‖ for every z, from w_o [head, d_head, d_model].

    R of the QR factorisation of W_Oᵀ: norms through it are as accurate as through W_O itself.

    >>> R = triangular(torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]]))
    >>> R[0].abs().tolist()
    [[5.0, 0.0], [0.0, 2.0]]
    """
    require_tensor("w_o", w_o, *_W_O)
    factor: Tensor = torch.linalg.qr(w_o.double().transpose(-1, -2), mode="r").R
    return factor


def head_norms(z: Tensor, factor: Tensor) -> Tensor:
    """Return ‖z W_O‖ [pos, head], float64, from z [pos, head, d_head] and the factor from `triangular`.

    >>> head_norms(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[5.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)).tolist()
    [[5.0]]
    """
    require_tensor("z", z, "pos", "head", "d_head")
    require_tensor("factor", factor, *_FACTOR)
    _require_sizes("factor", factor, (z.shape[1], factor.shape[1], z.shape[2]))
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    projection = factor.to(dtype).transpose(-1, -2)
    n_rows = _ROWS if z.device.type == "cpu" else max(1, len(z))
    norms = [factor.new_zeros((len(factor), 0))]
    for start in range(0, len(z), n_rows):
        by_head = z[start : start + n_rows].to(dtype).transpose(0, 1).contiguous() @ projection
        norms.append(torch.linalg.vector_norm(by_head, dim=-1, dtype=torch.float64))
    return torch.cat(norms, -1).T


class Writes(NamedTuple):
    """Norms of what one key writes, means over queries, float64: `heads` [head], and `layer` for the sum over heads.

    `value_writes` [head] and `layer_value_write` are ‖v W_O‖ and ‖Σ_h v W_O‖, the norms for an attention of 1.
    """

    heads: Tensor
    layer: Tensor
    value_writes: Tensor
    layer_value_write: Tensor


def writes(mass: Tensor, value: Tensor, w_o: Tensor) -> Writes:
    """Return the norms of what one key writes, from its attention mass [head, query], value [head, d_head] and w_o.
    ‖A[h, q] · v · W_O‖ is A[h, q] · ‖v W_O‖, because attention is not negative.

    >>> eye = torch.eye(2).expand(2, 2, 2)
    >>> result = writes(torch.tensor([[0.5, 1.0], [0.5, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), eye)
    >>> result.heads.tolist(), round(result.layer.item(), 4)
    ([1.5, 0.5], 1.7071)
    """
    require_tensor("mass", mass, "head", "query")
    require_tensor("value", value, "head", "d_head")
    require_tensor("w_o", w_o, *_W_O)
    _require_sizes("value", value, w_o.shape[:2])
    _require_sizes("mass", mass, (len(w_o), mass.shape[1]))
    head_writes = torch.einsum("hd,hdm->hm", value.double(), w_o.double())
    norms = torch.linalg.vector_norm(head_writes, dim=-1)
    mass = mass.double()
    # ‖Σ_h A[h, q] · w_h‖ through the triangular factor of the w_h: [head, head] in place of [head, d_model].
    factor = torch.linalg.qr(head_writes.T, mode="r").R
    layer_norms = torch.linalg.vector_norm(factor @ mass, dim=0)
    layer_value_write = torch.linalg.vector_norm(head_writes.sum(0))
    return Writes(mass.mean(-1) * norms, layer_norms.mean(), norms, layer_value_write)


def scaled_writes(mass: Tensor, values: Tensor, w_o: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of `writes`, means over queries, where a norm or gate scales a head's output at each query.

    Args:
        mass: [head, query], the attention on one key.
        values: [query, head, d_head], that key's value times the factors at each query.
        w_o: [head, d_head, d_model].
        factor: from `triangular`.

    Returns:
        The means by head [head] and for the sum over heads [], float64.

    >>> eye = torch.eye(2).expand(2, 2, 2)
    >>> values = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 1.0]]])
    >>> heads, layer = scaled_writes(torch.tensor([[0.5, 1.0], [0.5, 0.0]]), values, eye, triangular(eye))
    >>> heads.tolist(), round(layer.item(), 4)
    ([2.5, 0.5], 2.7071)
    """
    require_tensor("mass", mass, "head", "query")
    require_tensor("values", values, "query", "head", "d_head")
    require_tensor("w_o", w_o, *_W_O)
    require_tensor("factor", factor, *_FACTOR)
    _require_sizes("mass", mass, (len(w_o), mass.shape[1]))
    _require_sizes("values", values, (mass.shape[1], *w_o.shape[:2]))
    by_query = mass.double().T
    # A key without attention writes nothing, whatever its factors.
    weighed = torch.where(by_query[..., None] == 0, 0.0, by_query[..., None] * values.double())
    flat = w_o.double().flatten(0, 1)
    layer = torch.linalg.vector_norm(weighed.flatten(1) @ flat, dim=-1)
    return head_norms(weighed, factor).mean(0), layer.mean()


def _require_sizes(name: str, tensor: Tensor, sizes: tuple[int, ...]) -> None:
    """Raise InputError unless the tensor has these sizes."""
    if tensor.shape != sizes:
        raise InputError(f"expected {name} of shape {tuple(sizes)}, received {tuple(tensor.shape)}")
