"""Massive values: cells (head × dimension) of queries, keys and values whose norm over a text is far over the mean.

Jin et al. 2025 (arXiv:2502.01563). A cell's norm is taken after the rotation unless said otherwise: the rotation
mixes pairs of dimensions, so only the norm of a pair is the same before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phaselens.errors import InputError, require_number, require_whole

_FEW = 16
"""Squares added in single precision before their sum is widened."""


class Pairing(NamedTuple):
    """Which dimensions a rotation mixes: the first `rotary` of a head, i with i + rotary/2 or 2i with 2i + 1."""

    rotary: int
    layout: Literal["halves", "interleaved"]


def norm_matrix(states: Tensor) -> Tensor:
    """states [pos, head, d_head], pads left out → M [head, d_head], each cell's norm over the tokens, float64.

    >>> norm_matrix(torch.tensor([[[3.0, 0.0]], [[4.0, 1.0]]])).tolist()
    [[5.0, 1.0]]
    """
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
    if over not in ("global", "per_head"):
        raise InputError(f"expected over as global or per_head, received {over!r}")
    require_number("multiple", multiple, 0)
    mean = norms.mean() if over == "global" else norms.mean(-1, keepdim=True)
    return norms > multiple * mean


def pair_norms(norms: Tensor, pairing: Pairing) -> Tensor:
    """norms M [head, d_head] → [head, n]: norms of the pairs that the rotation mixes, then of the dimensions it
    leaves alone. The same before and after the rotation.

    >>> pair_norms(torch.tensor([[3.0, 0.0, 4.0, 1.0]]), Pairing(4, "halves")).tolist()
    [[5.0, 1.0]]
    """
    rotated, alone = norms[..., : pairing.rotary], norms[..., pairing.rotary :]
    if pairing.layout == "halves":
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    return torch.cat([torch.hypot(first, second), alone], dim=-1)


def pairings(d_head: int) -> list[Pairing]:
    """The pairings in use for heads of that size, the most usual first: all dimensions rotated, or a part.

    >>> pairings(8)[:2]
    [Pairing(rotary=8, layout='halves'), Pairing(rotary=8, layout='interleaved')]
    """
    require_whole("d_head", d_head, 1)
    sizes = [size for part in (1, 2, 4) for size in [d_head // part] if size >= 2 and size % 2 == 0]
    return [Pairing(size, layout) for size in dict.fromkeys(sizes) for layout in _LAYOUTS]


_LAYOUTS: tuple[Literal["halves", "interleaved"], ...] = ("halves", "interleaved")


def chosen_pairing(fits: Sequence[bool], d_head: int) -> int | None:
    """Which of `pairings(d_head)` a rotation has, given which of them keep all pair norms; None if none does.

    Where all do, nothing was rotated, and pairs are formed as is most usual. Else the one that rotates least: whoever
    pairs a rotated dimension right may pair those beyond, which stayed as they were, in any way.

    >>> chosen_pairing([False, True, False, True, False, False], 8), pairings(8)[3]
    (3, Pairing(rotary=4, layout='interleaved'))
    """
    fitting = [place for place, fit in enumerate(fits) if fit]
    if len(fitting) == len(fits):
        return 0
    return min(fitting, key=lambda place: (pairings(d_head)[place].rotary, place), default=None)


def pairing_error(before: Tensor, after: Tensor, pairing: Pairing) -> float:
    """How far pair norms differ before and after the rotation, relative to the largest: 0 for the right pairing.

    before and after: M [head, d_head] of the same states. A factor common to all cells, which some rotations carry
    (YaRN's), makes no difference.

    >>> M = torch.tensor([[3.0, 0.0, 4.0, 1.0]])
    >>> pairing_error(M, torch.tensor([[5.0, 1.0, 0.0, 0.0]]), Pairing(4, "halves"))
    0.0
    """
    first, second = pair_norms(before, pairing), pair_norms(after, pairing)
    sizes = [float(torch.linalg.vector_norm(each)) for each in (first, second)]
    if not all(sizes):
        return float(sizes[0] != sizes[1])
    first, second = first / sizes[0], second / sizes[1]
    return float((first - second).abs().max()) / float(first.max())


@lru_cache(maxsize=65536)
def gaussian_massive_share(n_tokens: int, multiple: float) -> float:
    """Share of cells whose norm over `n_tokens` Gaussian values is more than `multiple` times the mean cell's.

    The norm is chi-distributed with `n_tokens` degrees of freedom.

    >>> round(gaussian_massive_share(1, 5.0), 6), gaussian_massive_share(64, 5.0) < 1e-280
    (6.6e-05, True)
    """
    from scipy.special import gammaincc, gammaln

    require_whole("n_tokens", n_tokens, 0)
    require_number("multiple", multiple, 0)
    if n_tokens < 1:
        return float("nan")
    mean = np.sqrt(2) * np.exp(gammaln((n_tokens + 1) / 2) - gammaln(n_tokens / 2))
    return float(gammaincc(n_tokens / 2, (multiple * mean) ** 2 / 2))
