"""The largest product of a query and a key that it sees, of each head, and where it is.

A first pass in the states' precision finds each query's largest product: that of the streamed statistic, or one in
tiles of the matrix of products. The queries that may have the head's largest one, given the rounding of that pass, are
then compared in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phaselens.attention._accumulators import SMALLEST_SCALE
from phaselens.attention._arguments import require_query_and_key_states, require_window, shape_of
from phaselens.errors import InputError, require_tensor

_SIDE = 256
"""Queries and keys in one tile on a CPU, whose cache holds its products."""
_GPU_SIDE = 2048
"""The same on a GPU, where many small calls cost more than the memory."""
_N_PRODUCTS = 1 << 16
"""Products that are compared in float64 together."""
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class LargestProduct:
    """The largest |q·k| of each head, without scale, and the query and key that it belongs to; [head] each."""

    value: Tensor
    query: Tensor
    key: Tensor


def largest_product(
    q: Tensor, k: Tensor, *, window: int | None = None, by_query: Tensor | None = None
) -> LargestProduct:
    """Return the largest |q·k| over all queries and the keys that they see; the first of equal ones.

    Computed in float64; products that differ by no more than the rounding of a sum are equal. NaN, at query and key −1,
    for a head with a query or key that is not finite.

    Args:
        by_query: each query's largest |q·k| [head, query], to within the rounding of float32, as in
            `attn.hook_largest_product`. It saves a pass over all products.

    Raises:
        InputError: unless by_query is [head, query].

    >>> q = torch.tensor([[[1.0]], [[-4.0]], [[2.0]]])
    >>> k = torch.tensor([[[1.0]], [[2.0]], [[9.0]]])
    >>> largest = largest_product(q, k, window=2)
    >>> largest.value.tolist(), largest.query.tolist(), largest.key.tolist()
    ([18.0], [2], [2])
    """
    group = require_query_and_key_states(q, k)
    if window is not None:
        require_window(window)
    if by_query is not None:
        require_tensor("by_query", by_query)
        if by_query.shape != (q.shape[1], len(q)):
            raise InputError(
                f"expected by_query [head, query] = {(q.shape[1], len(q))}, received {shape_of(by_query)}"
            )
    # NaN or infinite for a head with such a number.
    largest_q, largest_k = (states.abs().amax((0, 2)).double() for states in (q, k))
    largest_k = largest_k.repeat_interleave(group)
    bounds = q.shape[2] * largest_q * largest_k
    has_products = largest_q.isfinite() & largest_k.isfinite()
    largest = LargestProduct(
        torch.full_like(bounds, torch.nan),
        torch.full_like(bounds, -1, dtype=torch.long),
        torch.full_like(bounds, -1, dtype=torch.long),
    )
    for head in has_products.nonzero()[:, 0].tolist():
        search = _Search(q[:, head], k[:, head // group], window, float(bounds[head]))
        streamed = None if by_query is None else by_query[head]
        largest.value[head], largest.query[head], largest.key[head] = search.largest(streamed)
    return largest


class _Search:
    """The search for the largest product of one head: queries and keys [pos, d_head], whose products are at most
    `bound`."""

    def __init__(self, queries: Tensor, keys: Tensor, window: int | None, bound: float) -> None:
        is_wide = queries.dtype == torch.float64 or bound > _FLOAT32_MAX
        dtype = torch.float64 if is_wide else torch.float32
        self._queries, self._keys = queries.to(dtype).contiguous(), keys.to(dtype).contiguous()
        self._window, self._bound = window, bound
        self._side = _SIDE if keys.device.type == "cpu" else _GPU_SIDE

    def largest(self, by_query: Tensor | None) -> tuple[float, int, int]:
        """Return the largest |q·k|, its query and its key."""
        if by_query is None or not bool(by_query.isfinite().all()):
            by_query = self._by_query()
        candidates = (by_query >= by_query.amax() - self._rounding(self._keys.dtype)).nonzero()[:, 0]
        n_together = max(1, _N_PRODUCTS // len(self._keys))
        pairs = [self._largest_of(rows) for rows in torch.split(candidates, n_together)]
        largest = max(value for value, _, _ in pairs)
        tie = self._rounding(torch.float64)
        # The queries ascend, so that the first pair has the first query.
        _, query, key = next(pair for pair in pairs if pair[0] >= largest - tie)
        return largest, query, key

    def _rounding(self, dtype: torch.dtype) -> float:
        """Return twice the largest error of a product in `dtype`, also of one that was read from a score.

        Such a score is relative to the row's log-sum-exp, which exceeds the row's largest score by no more than the
        logarithm of the number of keys; over the scale, to be a product.
        """
        n_keys, d_head = self._keys.shape
        excess = math.log(2 * n_keys) * math.sqrt(d_head) / SMALLEST_SCALE
        terms = d_head * self._bound + 4 * (self._bound + excess)
        return torch.finfo(dtype).eps * terms

    def _by_query(self) -> Tensor:
        """Return the largest |q·k| of each query, rounded."""
        n, side = len(self._keys), self._side
        largest = self._queries.new_zeros(n)
        for start in range(0, n, side):
            rows = slice(start, min(n, start + side))
            first_visible = 0 if self._window is None else max(0, start - self._window + 1)
            for first_key in range(first_visible // side * side, rows.stop, side):
                products = self._queries[rows] @ self._keys[first_key : first_key + side].T
                if first_key + side > start or first_key < rows.stop - (self._window or n):
                    queries = torch.arange(start, rows.stop, device=products.device)
                    products.masked_fill_(self._hidden(queries, first_key, products.shape[1]), 0.0)
                extremes = torch.maximum(products.amax(1), -products.amin(1))
                largest[rows] = torch.maximum(largest[rows], extremes)
        return largest

    def _hidden(self, queries: Tensor, first_key: int, n_keys: int) -> Tensor:
        """Return where `queries` [query] do not see consecutive keys, [query, key]."""
        key = torch.arange(first_key, first_key + n_keys, device=queries.device)
        hidden = key > queries[:, None]
        return hidden if self._window is None else hidden | (key <= queries[:, None] - self._window)

    def _largest_of(self, rows: Tensor) -> tuple[float, int, int]:
        """Return the largest |q·k| of some queries, the first query that has it, and its key."""
        stop = int(rows[-1]) + 1
        products = (self._queries[rows].double() @ self._keys[:stop].double().T).abs()
        products.masked_fill_(self._hidden(rows, 0, stop), -1.0)
        value = float(products.amax())
        is_largest = products >= value - self._rounding(torch.float64)
        row, key = divmod(int(is_largest.flatten().int().argmax()), stop)
        return value, int(rows[row]), key
