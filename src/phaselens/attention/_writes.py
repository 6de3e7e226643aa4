"""What attention heads write into the residual stream, without building [pos, head, d_model].

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
"""Tokens taken together, so that they stay in a CPU's cache."""


def triangular(w_o: Tensor) -> Tensor:
    """w_o [head, d_head, d_model] → R [head, d_head, d_head], float64, with ‖z W_O‖ = ‖R z‖ for every z.

    R of the QR factorisation of W_Oᵀ: norms through it are as accurate as through W_O itself.

    >>> R = triangular(torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]]))
    >>> R[0].abs().tolist()
    [[5.0, 0.0], [0.0, 2.0]]
    """
    require_tensor("w_o", w_o, *_W_O)
    factor: Tensor = torch.linalg.qr(w_o.double().transpose(-1, -2), mode="r").R
    return factor


def head_norms(z: Tensor, factor: Tensor) -> Tensor:
    """z [pos, head, d_head], factor from `triangular` → ‖z W_O‖ [pos, head], float64.

    >>> head_norms(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[5.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)).tolist()
    [[5.0]]
    """
    require_tensor("z", z, "pos", "head", "d_head")
    require_tensor("factor", factor, *_FACTOR)
    _require_sizes("factor", factor, (z.shape[1], factor.shape[1], z.shape[2]))
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    right = factor.to(dtype).transpose(-1, -2)
    n_rows = _ROWS if z.device.type == "cpu" else max(1, len(z))
    norms = [factor.new_zeros((len(factor), 0))]
    for start in range(0, len(z), n_rows):
        by_head = z[start : start + n_rows].to(dtype).transpose(0, 1).contiguous() @ right
        norms.append(torch.linalg.vector_norm(by_head, dim=-1, dtype=torch.float64))
    return torch.cat(norms, -1).T


class Writes(NamedTuple):
    """What one key writes, means over queries: by head [head], and all heads together.

    `value_writes` [head] and `together` are ‖v W_O‖ and ‖Σ_h v W_O‖: the same at an attention of 1.
    """

    heads: Tensor
    layer: Tensor
    value_writes: Tensor
    together: Tensor


def writes(mass: Tensor, value: Tensor, w_o: Tensor) -> Writes:
    """mass [head, query], the attention on one key; value [head, d_head], that key's; w_o → `Writes`, float64.

    ‖A[h, q] · v · W_O‖ is A[h, q] · ‖v W_O‖, for attention is not negative.

    >>> eye = torch.eye(2).expand(2, 2, 2)
    >>> found = writes(torch.tensor([[0.5, 1.0], [0.5, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), eye)
    >>> found.heads.tolist(), round(found.layer.item(), 4)
    ([1.5, 0.5], 1.7071)
    """
    require_tensor("mass", mass, "head", "query")
    require_tensor("value", value, "head", "d_head")
    require_tensor("w_o", w_o, *_W_O)
    _require_sizes("value", value, w_o.shape[:2])
    _require_sizes("mass", mass, (len(w_o), mass.shape[1]))
    written = torch.einsum("hd,hdm->hm", value.double(), w_o.double())
    norms = torch.linalg.vector_norm(written, dim=-1)
    mass = mass.double()
    # ‖Σ_h A[h, q] · w_h‖ through the triangular factor of the w_h: [head, head] in place of [head, d_model].
    factor = torch.linalg.qr(written.T, mode="r").R
    whole = torch.linalg.vector_norm(factor @ mass, dim=0)
    return Writes(mass.mean(-1) * norms, whole.mean(), norms, torch.linalg.vector_norm(written.sum(0)))


def scaled_writes(mass: Tensor, values: Tensor, w_o: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`writes` where a norm or gate scales a head's output anew at each query: means over queries, float64.

    Args:
        mass: [head, query], the attention on one key.
        values: [query, head, d_head], that key's value times the factors at each query.
        w_o: [head, d_head, d_model].
        factor: from `triangular`.

    Returns:
        By head [head], and of all heads together [].

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
    """InputError unless the tensor has the sizes that another one calls for."""
    if tensor.shape != sizes:
        raise InputError(f"expected {name} of shape {tuple(sizes)}, received {tuple(tensor.shape)}")
