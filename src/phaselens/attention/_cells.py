"""Massive values: cells (head × dimension) of queries, keys and values whose norm over a text is far over the mean.

Jin et al. 2025 (arXiv:2502.01563). A cell's norm is taken after the rotation unless said otherwise: the rotation
mixes pairs of dimensions, so only the norm of a pair is the same before and after it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from phaselens.errors import (
    InputError,
    is_list_like,
    is_whole,
    require_number,
    require_tensor,
    require_whole,
    short_form,
)

_FEW = 16
"""Squares added in single precision before their sum is widened."""


def norm_matrix(states: Tensor) -> Tensor:
    """states [pos, head, d_head], pads left out → M [head, d_head], each cell's norm over the tokens, float64.

    >>> norm_matrix(torch.tensor([[[3.0, 0.0]], [[4.0, 1.0]]])).tolist()
    [[5.0, 1.0]]
    """
    require_tensor("states", states, "pos", "head", "d_head")
    wide = states if states.dtype == torch.float64 else states.float()
    squares = wide.flatten(1).square()
    # Sums of a few in their own precision, all of those in float64.
    whole = len(squares) // _FEW * _FEW
    few = squares[:whole].view(-1, _FEW, squares.shape[1]).sum(1)
    total = few.sum(0, dtype=torch.float64) + squares[whole:].sum(0, dtype=torch.float64)
    return total.sqrt_().view(states.shape[1:])


def massive_cells(
    norms: Tensor, multiple: float = 5.0, over: Literal["global", "per_head"] = "global"
) -> Tensor:
    """norms M [head, d_head] → bool [head, d_head], True where a cell exceeds `multiple` times the mean.

    The mean is over all cells (`global`) or over those of the same head (`per_head`); both are in use.

    >>> M = torch.tensor([[5.0, 0.0, 1.0, 1.0], [20.0, 20.0, 20.0, 20.0]])
    >>> massive_cells(M, 1.5).sum().item(), massive_cells(M, 1.5, "per_head").sum().item()
    (4, 1)
    """
    require_tensor("norms", norms, "head", "d_head")
    if over not in ("global", "per_head"):
        raise InputError(f"expected over as global or per_head, received {short_form(over)}")
    require_number("multiple", multiple, 0)
    mean = norms.mean() if over == "global" else norms.mean(-1, keepdim=True)
    return norms > multiple * mean


def pair_norms(norms: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """norms M [head, d_head], pairs of dimensions that a rotation mixes → [head, pair], norms of the pairs.

    The same before and after the rotation. Dimensions in no pair are left out.

    >>> pair_norms(torch.tensor([[3.0, 0.0, 4.0, 1.0]]), [(0, 2)]).tolist()
    [[5.0]]
    """
    require_tensor("norms", norms, "…", "d_head")
    _require_pairs(pairs, norms.shape[-1])
    first, second = torch.tensor(pairs, dtype=torch.long, device=norms.device).view(-1, 2).unbind(-1)
    return torch.hypot(norms[..., first], norms[..., second])


def _require_pairs(pairs: Sequence[tuple[int, int]], d_head: int) -> None:
    """InputError unless they are pairs of dimensions of a head."""
    if not is_list_like(pairs, Collection):
        raise InputError(f"expected pairs as a list of pairs of dimensions, received {short_form(pairs)}")
    for pair in pairs:
        if not _is_pair(pair, d_head):
            raise InputError(
                f"expected each of pairs as two dimensions from 0 to {d_head - 1}, received {short_form(pair)}"
            )


def _is_pair(pair: object, d_head: int) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    first, second = pair
    return is_whole(first) and is_whole(second) and 0 <= first < d_head and 0 <= second < d_head


def gaussian_massive_share(n_tokens: int, multiple: float) -> float:
    """Share of cells whose norm over `n_tokens` Gaussian values is more than `multiple` times the mean cell's.

    The norm is chi-distributed with `n_tokens` degrees of freedom.

    >>> round(gaussian_massive_share(1, 5.0), 6), gaussian_massive_share(64, 5.0) < 1e-280
    (6.6e-05, True)
    """
    require_whole("n_tokens", n_tokens, 0)
    require_number("multiple", multiple, 0)
    return _gaussian_massive_share(n_tokens, multiple)


@lru_cache(maxsize=65536)
def _gaussian_massive_share(n_tokens: int, multiple: float) -> float:
    from scipy.special import gammaincc, gammaln

    if n_tokens < 1:
        return float("nan")
    mean = np.sqrt(2) * np.exp(gammaln((n_tokens + 1) / 2) - gammaln(n_tokens / 2))
    return float(gammaincc(n_tokens / 2, (multiple * mean) ** 2 / 2))
