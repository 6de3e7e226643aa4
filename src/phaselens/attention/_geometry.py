"""Geometry of queries and keys: cosines, and mean scores against one key and against the others.

Shapes: q [pos, head, d_head], k [pos, kv_head, d_head], of one text without pads, after rotation and norms. A query
sees itself and the keys before it, the last `window` of them if there is a window. Everything is O(pos) in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._arguments import require_query_and_key_states, require_window
from phaselens.errors import require_number, require_whole

_RUN = 64
"""Keys whose sums are accumulated one after the other, in all runs at once."""


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
    group = require_query_and_key_states(q, k)
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
    query_norms, key_norms = (torch.linalg.vector_norm(states, dim=-1) for states in (queries, keys))
    is_query, is_key = query_norms != 0, key_norms != 0
    # The direction of a key of norm 0 stays 0.
    directions = keys / torch.where(is_key, key_norms, 1.0)[..., None]
    along = _products(queries, directions[position].expand(len(queries), -1, -1), group)
    scores = along * key_norms[position].repeat_interleave(group)
    has_cosine = is_query & is_key[position].repeat_interleave(group)
    cosines = (along / query_norms).masked_fill(~has_cosine, torch.nan)
    n_directions = _sums_of_others(is_key.double(), position, first, stop, window).repeat_interleave(
        group, -1
    )
    along_others = _products(queries, _sums_of_others(directions, position, first, stop, window), group)
    cosines_of_others = along_others / (query_norms * n_directions)
    cosines_of_others.masked_fill_(~is_query | (n_directions == 0), torch.nan)
    n_seen = torch.arange(first + 1, stop + 1, dtype=torch.float64, device=q.device)
    n_others = (n_seen if window is None else n_seen.clamp(max=window)) - 1
    means = (
        _products(queries, _sums_of_others(keys, position, first, stop, window), group) / n_others[:, None]
    )
    bias = scale * (scores - means)
    return KeyGeometry(
        cosines.nanmean(0), cosines_of_others.nanmean(0), bias.mean(0), bias.std(0, correction=0)
    )


def _products(queries: Tensor, keys: Tensor, group: int) -> Tensor:
    """Return the dot products [query, head] of queries [query, head, d_head] with keys [query, kv_head, d_head]."""
    n_queries, n_heads, d_head = queries.shape
    grouped = queries.reshape(n_queries, n_heads // group, group, d_head)
    products: Tensor = torch.linalg.vecdot(grouped, keys[:, :, None])
    return products.flatten(1)


def _sums_of_others(values: Tensor, position: int, first: int, stop: int, window: int | None) -> Tensor:
    """Return the sums [query, …] of values [key, …] over the keys that each of the queries first … stop − 1 sees,
    without the one at `position`, which all of them see."""
    sums = _running_sums(values)
    if window is None or window >= stop:
        return sums[first:stop].sub_(values[position])
    totals = sums[first:stop] - values[position]
    first_to_miss_keys = max(first, window)
    totals[first_to_miss_keys - first :] -= sums[first_to_miss_keys - window : stop - window]
    return totals


def _running_sums(values: Tensor) -> Tensor:
    """Return the sums of values [key, …] over each key and those before it.

    `cumsum` along the first dimension reads a CPU's memory in strides, and takes five times as long.
    """
    n = len(values)
    n_runs = -(-n // _RUN)
    sums = values.new_empty((n_runs * _RUN, *values.shape[1:]))
    sums[:n], sums[n:] = values, 0.0
    runs = sums.view(n_runs, _RUN, *values.shape[1:])
    for index in range(1, _RUN):
        runs[:, index] += runs[:, index - 1]
    for index in range(1, n_runs):
        runs[index] += runs[index - 1, -1]
    return sums[:n]
