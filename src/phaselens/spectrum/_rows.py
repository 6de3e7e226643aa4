"""What stands in the residual stream: its first row, its massive rows and coordinates, and who wrote them.

Pure functions of one text's activations, pads left out: x [pos, d_model], norms [pos]. Sums and norms are
taken in float64, so half precision is widened before anything is squared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phaselens.errors import InputError, require_number, require_tensor, require_whole

_SAMPLE = 2000
"""Values looked at to learn about where a median is."""
_ROWS = 128
"""Rows widened to float64 at a time, so that they stay in a CPU's cache."""


def require_matrix(name: str, x: Tensor) -> None:
    """InputError unless it is a tensor of two dimensions."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        kind = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"expected {name} as a tensor [pos, d_model], received {kind}")


def row_norms(x: Tensor) -> Tensor:
    """x [..., d_model] → its rows' Euclidean norms [...], float64.

    >>> row_norms(torch.tensor([[3.0, 4.0]])).tolist()
    [5.0]
    """
    require_tensor("x", x, "…", "d_model")
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=-1) for part in _parts(x)])


def median(values: Tensor) -> float:
    """The middle one of `values` (any shape), or the mean of the two middle ones; NaN where there is none.

    NaN among the values makes it NaN. Exact, and linear in their number on a CPU.

    >>> median(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    2.5
    """
    require_tensor("values", values)
    flat = values.reshape(-1)
    n = flat.numel()
    if not n or bool(flat.amax().isnan()):  # a maximum is NaN where anything is
        return float("nan")
    low, high = (n - 1) // 2, n // 2
    if flat.device.type == "cpu":
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        some, n_below = _around_the_middle(wide.numpy())
        # To place one value takes numpy a sixth of the time of two; the other one is the largest below it.
        parted = np.partition(some, high - n_below)
        upper = float(parted[high - n_below])
        return upper if low == high else (float(parted[: high - n_below].max()) + upper) / 2
    ordered = flat.sort().values
    return (float(ordered[low]) + float(ordered[high])) / 2


def _around_the_middle(flat: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Those of `flat` [n] that stand in the middle when sorted, both middle ones among them, and how many are below.

    A sample says where to look, and counting whether it was right; if not, they are all.
    """
    n = len(flat)
    if n < 64 * _SAMPLE:
        return flat, 0
    sample = np.sort(flat[:: n // _SAMPLE])
    first, last = sample[int(0.47 * len(sample))], sample[int(0.53 * len(sample))]
    n_below = int(np.count_nonzero(flat < first))
    some = flat[(flat >= first) & (flat <= last)]
    has_both = n_below <= (n - 1) // 2 and n // 2 < n_below + len(some)
    return (some, n_below) if has_both else (flat, 0)


class BosNorm(NamedTuple):
    """Norm of row 0, and what it is over the mean and over the median norm of the other rows."""

    norm: float
    ratio: float
    ratio_median: float
    others: float
    others_median: float


def bos_norm(norms: Tensor) -> BosNorm:
    """norms [pos] of one text's rows → norm of row 0 and its ratios to the rest.

    NaN for what a text of one token does not have, and for ratios to rows that are all zero.
    Queipo-de-Llano et al. 2025 (arXiv:2510.06477), section 3; the median keeps a second massive row out of
    the denominator.

    >>> found = bos_norm(torch.tensor([10.0, 1.0, 1.0, 4.0], dtype=torch.float64))
    >>> found.norm, found.ratio, found.ratio_median
    (10.0, 5.0, 10.0)
    """
    require_tensor("norms", norms, "pos")
    missing = float("nan")
    if not len(norms):
        return BosNorm(missing, missing, missing, missing, missing)
    first = float(norms[0])
    if len(norms) < 2:
        return BosNorm(first, missing, missing, missing, missing)
    mean, middle = float(norms[1:].mean()), median(norms[1:])
    return BosNorm(
        first, first / mean if mean else missing, first / middle if middle else missing, mean, middle
    )


def massive_rows(norms: Tensor, factor: float = 10.0) -> Tensor:
    """norms [pos] → bool [pos], True where a row's norm is at least `factor` times the median row's.

    The row-wise form of Sun et al.'s criterion for single coordinates (arXiv:2402.17762, section 2), which a
    small model's activations never meet. None where the median is 0 or not finite.

    >>> massive_rows(torch.tensor([50.0, 1.0, 2.0, 1.0])).tolist()
    [True, False, False, False]
    """
    require_tensor("norms", norms, "pos")
    require_number("factor", factor, 0)
    middle = median(norms)
    if not middle > 0:  # 0, or NaN
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms >= factor * middle


class MassiveActivations(NamedTuple):
    """The largest coordinates, largest first; `median` is that of all coordinates' absolute values."""

    values: list[float]
    positions: list[int]
    dimensions: list[int]
    median: float
    n_massive: int

    @property
    def ratio(self) -> float:
        """The largest absolute value over the median; NaN where the median is 0."""
        return abs(self.values[0]) / self.median if self.median > 0 else float("nan")


def massive_activations(
    x: Tensor, *, n: int = 3, threshold: float = 100.0, ratio: float = 1000.0
) -> MassiveActivations:
    """x [pos, d_model] → its `n` largest coordinates, their median, and how many are massive.

    A coordinate a is massive if |a| > `threshold` and |a| ≥ `ratio` · median |x|, the median over all
    coordinates of all positions: Sun et al. 2024 (arXiv:2402.17762), section 2. There are none where a value
    is not finite; then the median is NaN.

    >>> x = torch.ones(4, 8)
    >>> x[2, 5] = -2000.0
    >>> found = massive_activations(x, n=1)
    >>> found.values, found.positions, found.dimensions, found.ratio, found.n_massive
    ([-2000.0], [2], [5], 2000.0, 1)
    """
    require_matrix("x", x)
    require_whole("n", n, 1)
    require_number("threshold", threshold, 0)
    require_number("ratio", ratio, 0)
    size = x.abs()
    middle = median(size)
    # The n largest coordinates stand in the n rows with the largest maxima.
    by_row = size.amax(-1) if size.numel() else size.new_zeros(0)
    if not middle < float("inf") or bool(by_row.isinf().any()):
        return MassiveActivations([], [], [], float("nan"), 0)
    rows = by_row.topk(min(n, len(x))).indices
    some = size[rows]
    places = some.reshape(-1).topk(min(n, some.numel())).indices
    found = [(int(rows[place // x.shape[-1]]), place % x.shape[-1]) for place in places.tolist()]
    apart = size[by_row > threshold]
    return MassiveActivations(
        [float(x[at]) for at in found],
        [position for position, _ in found],
        [dimension for _, dimension in found],
        middle,
        int(((apart > threshold) & (apart >= ratio * middle)).sum()),
    )


class Balance(NamedTuple):
    """Per token, [pos] each, float64: what attention and the MLP add to the residual stream.

    `share` is ‖a‖ / (‖a‖ + ‖m‖) and `projection` ⟨a, a + m⟩ / ‖a + m‖², NaN where the denominator is 0;
    `unaligned` is the projection that outputs of the same norms at right angles would have.
    """

    attn: Tensor
    mlp: Tensor
    share: Tensor
    projection: Tensor
    unaligned: Tensor


def balance(attn_out: Tensor, mlp_out: Tensor) -> Balance:
    """attn_out and mlp_out [pos, d_model], what the two add to the residual stream → `Balance`.

    The layer's own change is their sum, so the MLP's projection is 1 − attention's. Norms are no
    contributions: the two can cancel, and then the projection says so.

    >>> found = balance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    >>> round(found.share.item(), 4), round(found.projection.item(), 4)
    (0.4286, 0.36)
    """
    require_matrix("attn_out", attn_out)
    require_matrix("mlp_out", mlp_out)
    if attn_out.shape != mlp_out.shape:
        raise InputError(
            f"expected attn_out and mlp_out of one shape, received {tuple(attn_out.shape)} and {tuple(mlp_out.shape)}"
        )
    squares = _products(attn_out, mlp_out)
    change = squares[0] + 2 * squares[2] + squares[1]
    norms = squares[0].sqrt(), squares[1].sqrt()
    return Balance(
        *norms,
        _ratio(norms[0], norms[0] + norms[1]),
        _ratio(squares[0] + squares[2], change),
        _ratio(squares[0], squares[0] + squares[1]),
    )


def _parts(x: Tensor) -> list[Tensor]:
    if x.device.type != "cpu" or len(x) <= _ROWS:
        return [x]
    return [x[start : start + _ROWS] for start in range(0, len(x), _ROWS)]


def _products(a: Tensor, m: Tensor) -> list[Tensor]:
    """⟨a, a⟩, ⟨m, m⟩ and ⟨a, m⟩, [pos] each, float64."""
    parts = []
    for some, others in zip(_parts(a), _parts(m), strict=True):
        left, right = some.double(), others.double()
        parts.append([torch.linalg.vecdot(*pair) for pair in ((left, left), (right, right), (left, right))])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), torch.nan)
