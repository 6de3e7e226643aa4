"""The largest product of a query and a key that it sees, of each head, in tiles of the matrix of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._arguments import require_query_and_key_states, require_window

_SIDE = 256
"""Queries and keys in one tile on a CPU, whose cache holds its products."""
_GPU_SIDE = 2048
"""The same on a GPU, where many small calls cost more than the memory."""
_FLOAT32_MAX = torch.finfo(torch.float32).max


class _Tile(NamedTuple):
    """The queries start … stop − 1 and the keys first_key … key_end − 1."""

    start: int
    stop: int
    first_key: int
    key_end: int


@dataclass(frozen=True)
class LargestProduct:
    """The largest |q·k| of each head, without scale, and the query and key that it belongs to; [head] each."""

    value: Tensor
    query: Tensor
    key: Tensor


def largest_product(q: Tensor, k: Tensor, *, window: int | None = None) -> LargestProduct:
    """Return the largest |q·k| over all queries and the keys that they see; the first of equal ones.

    The pair is found in float32, or in float64 for float64 states and for products beyond float32; its product is
    computed in float64. NaN, at query and key −1, for a head with a query or key that is not finite.

    >>> q = torch.tensor([[[1.0]], [[-4.0]], [[2.0]]])
    >>> k = torch.tensor([[[1.0]], [[2.0]], [[9.0]]])
    >>> largest = largest_product(q, k, window=2)
    >>> largest.value.tolist(), largest.query.tolist(), largest.key.tolist()
    ([18.0], [2], [2])
    """
    group = require_query_and_key_states(q, k)
    if window is not None:
        require_window(window)
    # NaN or infinite for a head with such a number.
    largest_q, largest_k = (states.abs().amax((0, 2)).double() for states in (q, k))
    largest_k = largest_k.repeat_interleave(group)
    is_finite = largest_q.isfinite() & largest_k.isfinite()
    bounds = q.shape[2] * largest_q * largest_k
    pairs = []
    for head, (bound, has_products) in enumerate(zip(bounds.tolist(), is_finite.tolist(), strict=True)):
        if not has_products:
            pairs.append((torch.nan, -1, -1))
            continue
        queries, keys = q[:, head], k[:, head // group]
        is_wide = q.dtype == torch.float64 or bound > _FLOAT32_MAX
        dtype = torch.float64 if is_wide else torch.float32
        query, key = _largest_pair(queries.to(dtype), keys.to(dtype), window)
        pairs.append((abs(float(queries[query].double() @ keys[key].double())), query, key))
    values, query_indices, key_indices = zip(*pairs, strict=True)
    return LargestProduct(
        torch.tensor(values, dtype=torch.float64, device=q.device),
        torch.tensor(query_indices, device=q.device),
        torch.tensor(key_indices, device=q.device),
    )


def _largest_pair(queries: Tensor, keys: Tensor, window: int | None) -> tuple[int, int]:
    """Return the query and the key with the largest |q·k| of one head; queries and keys [pos, d_head], finite."""
    n = len(queries)
    queries, keys = queries.contiguous(), keys.contiguous()
    side = _SIDE if queries.device.type == "cpu" else _GPU_SIDE
    tiles = [
        _Tile(start, min(n, start + side), first_key, min(n, first_key + side))
        for start in range(0, n, side)
        for first_key in range(_first_visible(start, window) // side * side, min(n, start + side), side)
    ]
    extremes = torch.stack([torch.stack(_products(queries, keys, tile, window).aminmax()) for tile in tiles])
    largest = extremes.abs().amax(-1)
    highest = largest.amax()
    pairs: list[tuple[int, int]] = []
    for index in (largest == highest).nonzero()[:, 0].tolist():
        tile = tiles[index]
        if pairs and tile.start > min(pairs)[0]:
            break  # Its queries come after that of a pair which is as large.
        products = _products(queries, keys, tile, window)
        row, column = divmod(int((products.abs() == highest).flatten().int().argmax()), products.shape[1])
        pairs.append((tile.start + row, tile.first_key + column))
    return min(pairs)


def _first_visible(query: int, window: int | None) -> int:
    return 0 if window is None else max(0, query - window + 1)


def _products(queries: Tensor, keys: Tensor, tile: _Tile, window: int | None) -> Tensor:
    """Return the products [query, key] of a tile, 0 where a query does not see the key."""
    start, stop, first_key, key_end = tile
    products = queries[start:stop] @ keys[first_key:key_end].T
    is_cut_by_window = window is not None and first_key <= stop - 1 - window
    if key_end - 1 > start or is_cut_by_window:
        query = torch.arange(start, stop, device=queries.device)[:, None]
        key = torch.arange(first_key, key_end, device=queries.device)
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        products.masked_fill_(hidden, 0.0)
    return products
