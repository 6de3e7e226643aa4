"""Geometry of queries and keys: cosines, mean scores against one key and against the others, and the largest product.

Shapes: q [pos, head, d_head], k [pos, kv_head, d_head], of one text without pads, after rotation and norms. A query
sees itself and the keys before it, the last `window` of them if there is a window. Everything is O(pos) in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._arguments import require_window
from phaselens.errors import InputError, require_number, require_tensor, require_whole

_MAX_PRODUCTS = 1 << 22
"""Products of queries and keys in memory at one time."""
_ROWS = 256


class KeyGeometry(NamedTuple):
    """How the queries after one key meet that key, and the other keys that they see; [head] each, float64.

    `cosine` and `cosine_others` are mean cosines, `bias` and `bias_sd` the mean and the standard deviation (ddof 0)
    over queries of the scaled score of the key minus the mean scaled score of the others. NaN where no query or no key
    counts: a query or key of norm 0 has no cosine.
    """

    cosine: Tensor
    cosine_others: Tensor
    bias: Tensor
    bias_sd: Tensor


def key_geometry(
    q: Tensor, k: Tensor, *, scale: float, position: int = 0, window: int | None = None
) -> KeyGeometry:
    """Return the geometry of the key at `position`, over the queries after it that see it. METRICS 10.8.

    Sums over keys are differences of cumulative sums, so no matrix of scores is built. `scale` multiplies the scores; a
    softcap is not applied.

    >>> q = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]])
    >>> k = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]])
    >>> geometry = key_geometry(q, k, scale=0.5)
    >>> geometry.cosine.item(), geometry.cosine_others.item(), geometry.bias.tolist(), geometry.bias_sd.tolist()
    (1.0, 0.0, [2.25], [0.75])
    """
    group = _require_states(q, k)
    require_number("scale", scale)
    require_whole("position", position, 0)
    if window is not None:
        require_window(window)
    n, n_heads = q.shape[:2]
    first, stop = position + 1, n if window is None else min(n, position + window)
    if first >= stop:
        missing = torch.full((n_heads,), torch.nan, dtype=torch.float64, device=q.device)
        return KeyGeometry(missing, missing, missing, missing)
    queries, keys = q[first:stop].double(), k[:stop].double()
    unit_queries, unit_keys = _unit(queries), _unit(keys)
    is_key = (keys != 0).any(-1)
    is_query = (queries != 0).any(-1)
    cosines = _products(unit_queries, unit_keys[position].expand(len(queries), -1, -1), group)
    cosines = cosines.masked_fill(~(is_query & _by_query_head(is_key[position], group)), torch.nan)
    other_units = _sums_of_others(unit_keys, position, first, stop, window)
    n_units = _by_query_head(_sums_of_others(is_key.double(), position, first, stop, window), group)
    cosines_of_others = _products(unit_queries, other_units, group) / n_units
    cosines_of_others = cosines_of_others.masked_fill(~is_query | (n_units == 0), torch.nan)
    n_others = _sums_of_others(torch.ones_like(keys[:, :1, 0]), position, first, stop, window)
    means = _products(queries, _sums_of_others(keys, position, first, stop, window), group) / n_others
    bias = scale * (_products(queries, keys[position].expand(len(queries), -1, -1), group) - means)
    return KeyGeometry(
        cosines.nanmean(0), cosines_of_others.nanmean(0), bias.mean(0), bias.std(0, correction=0)
    )


@dataclass(frozen=True)
class LargestProduct:
    """The largest |q·k| of each head, without scale, and the query and key that it belongs to; [head] each."""

    value: Tensor
    query: Tensor
    key: Tensor


def largest_product(q: Tensor, k: Tensor, *, window: int | None = None) -> LargestProduct:
    """Return the largest |q·k| over all queries and the keys that they see; the first of equal ones.

    NaN, at query and key −1, for a head with a query or key that is not finite. Half precision is multiplied in
    float32.

    >>> q = torch.tensor([[[1.0]], [[-4.0]], [[2.0]]])
    >>> k = torch.tensor([[[1.0]], [[2.0]], [[9.0]]])
    >>> largest = largest_product(q, k, window=2)
    >>> largest.value.tolist(), largest.query.tolist(), largest.key.tolist()
    ([18.0], [2], [2])
    """
    group = _require_states(q, k)
    if window is not None:
        require_window(window)
    n, n_heads = q.shape[:2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(wide).transpose(0, 1).reshape(n_heads // group, group, n, -1)
    keys = k.to(wide).permute(1, 2, 0)
    value = torch.full((n_heads,), -1.0, dtype=wide, device=q.device)
    best_query, best_key = (
        value.new_zeros(n_heads, dtype=torch.long),
        value.new_zeros(n_heads, dtype=torch.long),
    )
    n_rows = max(1, min(_ROWS, _MAX_PRODUCTS // (n_heads * n)))
    for start in range(0, n, n_rows):
        stop = min(n, start + n_rows)
        first_key = 0 if window is None else max(0, start - window + 1)
        rows = queries[:, :, start:stop].flatten(1, 2)
        products = (rows @ keys[:, :, first_key:stop]).abs_().view(n_heads, stop - start, -1)
        query = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(first_key, stop, device=q.device)
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        largest, index = products.masked_fill_(hidden, -1.0).flatten(1).max(1)
        is_larger = largest > value
        value = torch.where(is_larger, largest, value)
        best_query = torch.where(is_larger, start + index // products.shape[-1], best_query)
        best_key = torch.where(is_larger, first_key + index % products.shape[-1], best_key)
    finite_keys = _by_query_head(k.isfinite().all(-1).all(0), group)
    is_finite = q.isfinite().all(-1).all(0) & finite_keys
    return LargestProduct(
        torch.where(is_finite, value, torch.nan).double(),
        torch.where(is_finite, best_query, -1),
        torch.where(is_finite, best_key, -1),
    )


def _require_states(q: Tensor, k: Tensor) -> int:
    """Return the number of query heads for each key head; raise InputError for shapes that do not fit."""
    require_tensor("q", q, "pos", "head", "d_head")
    require_tensor("k", k, "pos", "kv_head", "d_head")
    if (
        not q.numel()
        or not k.numel()
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise InputError(
            "expected k [pos, kv_head, d_head] with q's positions and d_head, its heads dividing q's, "
            f"received q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    return q.shape[1] // k.shape[1]


def _unit(states: Tensor) -> Tensor:
    """Divide states [..., d_head] by their norms; those of norm 0 stay 0."""
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / torch.where(norms == 0, 1.0, norms)


def _by_query_head(values: Tensor, group: int) -> Tensor:
    """Repeat values [..., kv_head] for the query heads that share a key head."""
    return values.repeat_interleave(group, dim=-1)


def _products(queries: Tensor, keys: Tensor, group: int) -> Tensor:
    """Return the dot products [query, head] of queries [query, head, d_head] with keys [query, kv_head, d_head]."""
    n_queries, n_heads, d_head = queries.shape
    grouped = queries.reshape(n_queries, n_heads // group, group, d_head)
    products: Tensor = torch.linalg.vecdot(grouped, keys[:, :, None])
    return products.flatten(1)


def _sums_of_others(values: Tensor, position: int, first: int, stop: int, window: int | None) -> Tensor:
    """Return the sums [query, …] of values [key, …] over the keys that each of the queries first … stop − 1 sees,
    without the one at `position`, which all of them see."""
    sums = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    totals = sums[first + 1 : stop + 1] - values[position]
    if window is not None:
        n_hidden = (torch.arange(first, stop, device=values.device) + 1 - window).clamp(min=0)
        totals = totals - sums[n_hidden]
    return totals
