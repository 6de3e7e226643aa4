"""Massive values: cells (head × dimension) of queries, keys and values whose norm over a text far exceeds the mean.

Jin et al. 2025 (arXiv:2502.01563). Norms are taken after the rotation unless stated otherwise: the rotation
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

_N_SINGLE = 16
"""Number of squares that are summed in their own precision before the sum is widened."""


def norm_matrix(states: Tensor) -> Tensor:
    """Return each cell's norm over the tokens, M [head, d_head], float64, from states [pos, head, d_head] without pads.

    >>> norm_matrix(torch.tensor([[[3.0, 0.0]], [[4.0, 1.0]]])).tolist()
    [[5.0, 1.0]]
    """
    require_tensor("states", states, "pos", "head", "d_head")
    wide = states if states.dtype == torch.float64 else states.float()
    squares = wide.flatten(1).square()
    # Groups are summed in their own precision, their sums in float64.
    n_grouped = len(squares) // _N_SINGLE * _N_SINGLE
    group_sums = squares[:n_grouped].view(-1, _N_SINGLE, squares.shape[1]).sum(1)
    total = group_sums.sum(0, dtype=torch.float64) + squares[n_grouped:].sum(0, dtype=torch.float64)
    return total.sqrt_().view(states.shape[1:])


def massive_cells(
    norms: Tensor, multiple: float = 5.0, over: Literal["global", "per_head"] = "global"
) -> Tensor:
    """Return bool [head, d_head], True where a cell of norms M [head, d_head] exceeds `multiple` times the mean.

    The mean is over all cells (`global`) or over those of the same head (`per_head`); both are in use.

    Raises:
        InputError: unless over is `global` or `per_head`.

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
    """Return the norms [head, pair] of pairs of dimensions that a rotation mixes, from norms M [head, d_head].

    The rotation does not change them. Dimensions that are in no pair are left out.

    >>> pair_norms(torch.tensor([[3.0, 0.0, 4.0, 1.0]]), [(0, 2)]).tolist()
    [[5.0]]
    """
    require_tensor("norms", norms, "…", "d_head")
    _require_pairs(pairs, norms.shape[-1])
    first, second = torch.tensor(pairs, dtype=torch.long, device=norms.device).view(-1, 2).unbind(-1)
    return torch.hypot(norms[..., first], norms[..., second])


def _require_pairs(pairs: Sequence[tuple[int, int]], d_head: int) -> None:
    """Raise InputError unless `pairs` are pairs of dimensions of a head."""
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
    """Return the share of cells whose norm over `n_tokens` Gaussian values exceeds `multiple` times the mean cell's.

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
