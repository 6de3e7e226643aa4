"""How far apart the rows of a text are: rank collapse, the spread of its prefixes, likeness of neighbours, change.

Pure functions of one text's activations without pads: x [pos, d_model]. Everything is computed in float64, in blocks of
rows, so that no copy of x in float64 is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from phaselens.errors import InputError, require_tensor, require_whole, type_unless_whole
from phaselens.spectrum._rows import CACHED_ROWS, require_matrix


def rank_collapse(x: Tensor) -> float:
    """Return ‖X − 1 x̄ᵀ‖ / ‖X‖ (Frobenius) of the rows of x [pos, d_model]: 0 if all rows are equal.

    x̄ is the mean row. NaN without rows, or if all are zero. METRICS 10.9; the residual of Dong et al. 2021
    (arXiv:2103.03404) in the Frobenius norm.

    >>> rank_collapse(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    0.7071067811865476
    >>> rank_collapse(torch.ones(4, 3))
    0.0
    """
    require_matrix("x", x)
    if not len(x):
        return math.nan
    mean = torch.stack([rows.sum(0) for rows in _blocks(x)]).sum(0) / len(x)
    distance = math.fsum(float((rows - mean).square().sum()) for rows in _blocks(x))
    total = math.fsum(float(rows.square().sum()) for rows in _blocks(x))
    return math.sqrt(distance / total) if total else math.nan


def prefix_spread(x: Tensor) -> Tensor:
    """Return `rank_collapse` of each prefix of the rows of x [pos, d_model]: [pos], float64.

    Entry t is that of rows 0 … t; entry 0 is 0. Without spread, a model without position encodings attends evenly and
    cannot tell positions apart; compare Theorem 3.4 of Gelberg et al. 2025 (arXiv:2512.12167), which bounds both by the
    largest distance within a prefix instead of the mean one. Costs O(pos · d_model).

    >>> prefix_spread(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])).round(decimals=3).tolist()
    [0.0, 0.707, 0.816]
    """
    require_matrix("x", x)
    n_before = 0
    sum_before = x.new_zeros(x.shape[1], dtype=torch.float64)
    steps, squares = [], []
    for rows in _blocks(x):
        # Each row adds its squared distance from the mean of those before it, times n / (n + 1): terms above 0 only, so
        # that nothing cancels.
        # Transposed, because `cumsum` along the first dimension reads a CPU's memory in strides.
        running_sums = rows.T.contiguous().cumsum(1).T
        sums = torch.cat([sum_before[None], sum_before + running_sums])
        counts = torch.arange(n_before, n_before + len(rows), dtype=torch.float64, device=x.device)
        means = sums[:-1] / torch.where(counts > 0, counts, 1.0)[:, None]
        steps.append((rows - means).square().sum(1) * counts / (counts + 1))
        squares.append(rows.square().sum(1))
        n_before, sum_before = n_before + len(rows), sums[-1]
    if not steps:
        return x.new_zeros(0, dtype=torch.float64)
    # Rows that are all zero have 0 / 0, which is NaN.
    return (torch.cat(steps).cumsum(0) / torch.cat(squares).cumsum(0)).sqrt()


def random_spread(n: int) -> float:
    """Return the root of the expected square of `rank_collapse` for `n` rows in random directions: √(1 − 1/n).

    Exact for rows of any norms whose directions are independent and have mean 0. NaN for n = 0.

    >>> random_spread(4)
    0.8660254037844386
    """
    require_whole("n", n, 0)
    return math.sqrt(1 - 1 / n) if n else math.nan


def relative_change(x: Tensor, changed: Tensor) -> Tensor:
    """Return ‖y_t − x_t‖ / ‖x_t‖ [pos] of the rows of x and of `changed`, both [pos, d_model]; float64.

    NaN where x_t is zero. METRICS 10.9.

    Raises:
        InputError: for two shapes.

    >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])).tolist()
    [0.2]
    """
    require_matrix("x", x)
    require_matrix("changed", changed)
    if x.shape != changed.shape:
        raise InputError(f"expected changed of shape {list(x.shape)}, received {list(changed.shape)}")
    changes = [
        torch.linalg.vector_norm(new_rows - rows, dim=1) / torch.linalg.vector_norm(rows, dim=1)
        for rows, new_rows in zip(_blocks(x), _blocks(changed), strict=True)
    ]
    norms_are_zero = [~rows.any(1) for rows in _blocks(x)]
    if not changes:
        return x.new_zeros(0, dtype=torch.float64)
    return torch.cat(changes).masked_fill(torch.cat(norms_are_zero), torch.nan)


def adjacency(x: Tensor, partners: Tensor) -> float:
    """Return the share of rows i of x [pos, d_model] that are closer to row i + 1 than to row `partners`[i].

    `partners` [pos − 1] are whole numbers, rows drawn at random. Closer means a greater cosine; an equal one counts as
    half. Exchangeable rows have 0.5. NaN without a pair, or if a row is zero or not finite. METRICS 10.10.

    Raises:
        InputError: unless partners are whole numbers [pos − 1] that are rows of x.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 1.0]])
    >>> adjacency(x, torch.tensor([2, 3, 0]))
    1.0
    """
    require_matrix("x", x)
    require_tensor("partners", partners, "pos − 1")
    if type_unless_whole(partners) or len(partners) != max(0, len(x) - 1):
        raise InputError(
            f"expected partners [{max(0, len(x) - 1)}] as whole numbers, received {partners.dtype} "
            f"{list(partners.shape)}"
        )
    if len(partners) and not 0 <= int(partners.min()) <= int(partners.max()) < len(x):
        raise InputError(
            f"expected partners from 0 to {len(x) - 1}, received {int(partners.min())} to {int(partners.max())}"
        )
    n_closer = 0.0
    for start in range(0, len(partners), CACHED_ROWS):
        chosen = partners[start : start + CACHED_ROWS].to(x.device)
        rows, neighbours, drawn = (
            x[index].double()
            for index in (
                slice(start, start + len(chosen)),
                slice(start + 1, start + 1 + len(chosen)),
                chosen,
            )
        )
        difference = _cosine(rows, neighbours) - _cosine(rows, drawn)
        if bool(difference.isnan().any()):  # whose sign would be 0
            return math.nan
        n_closer += float(difference.sign().sum() / 2 + len(chosen) / 2)
    return n_closer / len(partners) if len(partners) else math.nan


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Yield the rows of x in float64, a block at a time."""
    for start in range(0, len(x), CACHED_ROWS):
        yield x[start : start + CACHED_ROWS].double()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines [pos] of rows of a and b; NaN for a zero row."""
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / norms
