"""Rows of the residual stream: the first row, massive rows and coordinates, and the shares of attention and MLP.

Pure functions of one text's activations without pads: x [pos, d_model], norms [pos]. Sums and norms are computed in
float64; half precision is widened before it is squared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phaselens.errors import InputError, require_number, require_tensor, require_whole

_SAMPLE = 2000
"""Number of values sampled to locate a median."""
CACHED_ROWS = 128
"""Rows widened to float64 at a time, so that they stay in a CPU's cache."""
_CACHED_NUMBERS = 1 << 16
"""Numbers widened at a time, where that makes more than `CACHED_ROWS` rows."""


def require_matrix(name: str, x: Tensor) -> None:
    """Raise InputError unless `x` is a tensor of two dimensions."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        received = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"expected {name} as a tensor [pos, d_model], received {received}")


def row_norms(x: Tensor) -> Tensor:
    """Return the Euclidean norms [...] of the rows of x [..., d_model], float64.

    >>> row_norms(torch.tensor([[3.0, 4.0]])).tolist()
    [5.0]
    """
    require_tensor("x", x, "…", "d_model")
    if x.ndim == 1:
        norm: Tensor = torch.linalg.vector_norm(x.double())
        return norm
    return torch.cat([torch.linalg.vector_norm(chunk.double(), dim=-1) for chunk in _row_chunks(x)])


def row_cosines(x: Tensor, row: Tensor) -> Tensor:
    """Return the cosines [pos] of the rows of x [pos, d_model] with `row` [d_model], float64; NaN where either is zero.

    Raises:
        InputError: unless row is [d_model].

    >>> row_cosines(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])).tolist()
    [0.6, nan]
    """
    require_matrix("x", x)
    require_tensor("row", row, "d_model")
    if row.shape != x.shape[1:]:
        raise InputError(f"expected row of {x.shape[1]} entries, as those of x, received {tuple(row.shape)}")
    wide = row.double()
    products = torch.cat([chunk.double() @ wide for chunk in _row_chunks(x)])
    scales = row_norms(x) * torch.linalg.vector_norm(wide)
    return _ratio(products, scales)


def median(values: Tensor) -> float:
    """Return the median of `values` (any shape), the mean of the two middle ones for an even number.

    NaN if there are no values or any is NaN. Exact, and linear in the number of values on a CPU.

    >>> median(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    2.5
    """
    require_tensor("values", values)
    flat = values.detach().reshape(-1)
    n = flat.numel()
    if not n or bool(flat.amax().isnan()):  # the maximum is NaN if any value is
        return math.nan
    low, high = (n - 1) // 2, n // 2
    if flat.device.type == "cpu":
        # numpy has no bfloat16, and is slow in float16; all other types it orders as they are.
        wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        middle, n_below = _middle_values(wide.numpy())
        # Partitioning at one value takes numpy a sixth of the time of two; the other one is the largest below it.
        partitioned = np.partition(middle, high - n_below)
        upper = float(partitioned[high - n_below])
        return upper if low == high else (float(partitioned[: high - n_below].max()) + upper) / 2
    ordered = flat.sort().values
    return (float(ordered[low]) + float(ordered[high])) / 2


def _middle_values(flat: NDArray[np.floating]) -> tuple[NDArray[np.floating], int]:
    """Return the values of `flat` [n] around its median, middle values included, and the number of values below them.

    A sample estimates their range, and counting verifies it; if it was wrong, all of `flat` is returned.
    """
    n = len(flat)
    if n < 64 * _SAMPLE:
        return flat, 0
    sample = np.sort(flat[:: n // _SAMPLE])
    low, high = sample[int(0.47 * len(sample))], sample[int(0.53 * len(sample))]
    n_below = int(np.count_nonzero(flat < low))
    middle = flat[(flat >= low) & (flat <= high)]
    has_both = n_below <= (n - 1) // 2 and n // 2 < n_below + len(middle)
    return (middle, n_below) if has_both else (flat, 0)


class BosNormRows(NamedTuple):
    """Norm of row 0, and its ratios to the mean and the median norm of the other rows."""

    norm: float
    ratio: float
    ratio_median: float
    others_mean: float
    others_median: float


def bos_norm(norms: Tensor) -> BosNormRows:
    """Return the norm of row 0 and its ratios to the other rows, from the norms [pos] of one text's rows.

    NaN where a text of one token has no other rows, and for ratios to rows that are all zero.
    Queipo-de-Llano et al. 2025 (arXiv:2510.06477), section 3; the median keeps a second massive row out of
    the denominator.

    >>> bos = bos_norm(torch.tensor([10.0, 1.0, 1.0, 4.0], dtype=torch.float64))
    >>> bos.norm, bos.ratio, bos.ratio_median
    (10.0, 5.0, 10.0)
    """
    require_tensor("norms", norms, "pos")
    missing = math.nan
    if not len(norms):
        return BosNormRows(missing, missing, missing, missing, missing)
    norm = float(norms[0])
    if len(norms) < 2:
        return BosNormRows(norm, missing, missing, missing, missing)
    mean, middle = float(norms[1:].double().mean()), median(norms[1:])
    return BosNormRows(
        norm, norm / mean if mean else missing, norm / middle if middle else missing, mean, middle
    )


def massive_rows(norms: Tensor, factor: float = 10.0) -> Tensor:
    """Return bool [pos], True where a row's norm, of norms [pos], is at least `factor` times the median row's.

    The row-wise form of Sun et al.'s criterion for single coordinates (arXiv:2402.17762, section 2), which a
    small model's activations never meet. No row is massive where the median is 0 or not finite.

    >>> massive_rows(torch.tensor([50.0, 1.0, 2.0, 1.0])).tolist()
    [True, False, False, False]
    """
    require_tensor("norms", norms, "pos")
    require_number("factor", factor, 0)
    middle = median(norms)
    if not middle > 0:  # 0, or NaN
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms >= factor * middle


class MassiveActivationRows(NamedTuple):
    """The largest coordinates, largest first; `median` is the median absolute value of all coordinates."""

    values: list[float]
    positions: list[int]
    dimensions: list[int]
    median: float
    n_massive: int

    @property
    def ratio(self) -> float:
        """The largest absolute value divided by the median; NaN where the median is 0."""
        return abs(self.values[0]) / self.median if self.median > 0 else math.nan


def massive_activations(
    x: Tensor, *, n: int = 3, threshold: float = 100.0, ratio: float = 1000.0
) -> MassiveActivationRows:
    """Return the `n` largest coordinates of x [pos, d_model], the median of all, and the number that are massive.

    A coordinate a is massive if |a| > `threshold` and |a| ≥ `ratio` · median |x|, the median over all
    coordinates of all positions: Sun et al. 2024 (arXiv:2402.17762), section 2. Where a value is not
    finite, there are no coordinates and the median is NaN.

    >>> x = torch.ones(4, 8)
    >>> x[2, 5] = -2000.0
    >>> rows = massive_activations(x, n=1)
    >>> rows.values, rows.positions, rows.dimensions, rows.ratio, rows.n_massive
    ([-2000.0], [2], [5], 2000.0, 1)
    """
    require_matrix("x", x)
    require_whole("n", n, 1)
    require_number("threshold", threshold, 0)
    require_number("ratio", ratio, 0)
    size = x.abs()
    middle = median(size)
    missing = MassiveActivationRows([], [], [], math.nan, 0)
    if math.isnan(middle):  # there is no value, or one is NaN
        return missing
    # The n largest coordinates are in the n rows with the largest maxima.
    by_row = size.amax(1)
    if bool(by_row.isinf().any()):
        return missing
    rows = by_row.topk(min(n, len(x))).indices
    row_values = size[rows]
    flat_indices = row_values.reshape(-1).topk(min(n, row_values.numel())).indices
    coordinates = [(int(rows[index // x.shape[1]]), index % x.shape[1]) for index in flat_indices.tolist()]
    candidates = size[by_row > threshold]
    return MassiveActivationRows(
        [float(x[coordinate]) for coordinate in coordinates],
        [position for position, _ in coordinates],
        [dimension for _, dimension in coordinates],
        middle,
        int(((candidates > threshold) & (candidates >= ratio * middle)).sum()),
    )


def massive_coordinates(x: Tensor, *, threshold: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Return bool [pos, d_model], True for the coordinates of x [pos, d_model] that are massive.

    The criterion is that of `massive_activations`. No coordinate is massive where a value is not finite.

    >>> x = torch.ones(4, 8)
    >>> x[2, 5] = -2000.0
    >>> massive_coordinates(x).nonzero().tolist()
    [[2, 5]]
    """
    require_matrix("x", x)
    require_number("threshold", threshold, 0)
    require_number("ratio", ratio, 0)
    size = x.abs()
    middle = median(size)
    if math.isnan(middle) or bool(size.isinf().any()):
        return torch.zeros_like(x, dtype=torch.bool)
    return (size > threshold) & (size >= ratio * middle)


class Balance(NamedTuple):
    """Norms and shares of what attention and the MLP add to the residual stream, [pos] each, float64.

    `share` is ‖a‖ / (‖a‖ + ‖m‖) and `projection` ⟨a, a + m⟩ / ‖a + m‖², NaN where the denominator is 0;
    `unaligned` is the projection of orthogonal outputs with the same norms.
    """

    attn: Tensor
    mlp: Tensor
    share: Tensor
    projection: Tensor
    unaligned: Tensor


def balance(attn_out: Tensor, mlp_out: Tensor) -> Balance:
    """Return the `Balance` of attn_out and mlp_out [pos, d_model], the additions to the residual stream.

    The layer's change is their sum, so the MLP's projection is 1 − attention's. Norms are not contributions: the
    two can cancel, which only the projection shows.

    Raises:
        InputError: for two shapes.

    >>> result = balance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    >>> round(result.share.item(), 4), round(result.projection.item(), 4)
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


def chunks(x: Tensor, n_rows: int) -> list[Tensor]:
    """Split x [pos, …] into parts of `n_rows` rows; the last one may have fewer."""
    return [x[start : start + n_rows] for start in range(0, len(x), n_rows)]


def _row_chunks(x: Tensor) -> list[Tensor]:
    n_rows = max(CACHED_ROWS, _CACHED_NUMBERS // max(1, x.shape[1:].numel()))
    return [x] if x.device.type != "cpu" or len(x) <= n_rows else chunks(x, n_rows)


def _products(a: Tensor, m: Tensor) -> list[Tensor]:
    """Return ⟨a, a⟩, ⟨m, m⟩ and ⟨a, m⟩, [pos] each, float64."""
    products = []
    for a_chunk, m_chunk in zip(_row_chunks(a), _row_chunks(m), strict=True):
        a_wide, m_wide = a_chunk.double(), m_chunk.double()
        pairs = ((a_wide, a_wide), (m_wide, m_wide), (a_wide, m_wide))
        products.append([torch.linalg.vecdot(*pair) for pair in pairs])
    return [torch.cat(chunks) for chunks in zip(*products, strict=True)]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.nan)
