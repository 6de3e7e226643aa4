"""Null values of the attention statistics: attention spread evenly over the visible keys."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from phaselens.attention._problem import require_window
from phaselens.errors import require_flag, require_whole


def uniform_sink(
    n_tokens: int, include_query0: bool = False, position: int = 0, window: int | None = None
) -> float | None:
    """Return the sink score of uniform attention in a text of `n_tokens`; None if no query counts.

    The mean of 1 / (keys seen) over the queries that see the key: max(position, 1) … n_tokens − 1 (from 0 with
    `include_query0`), and with `window` no further than position + window − 1. That is (H_T − 1) / (T − 1) for
    position 0, or H_T / T with query 0, where H_T is a harmonic number. METRICS 2.1 (a).

    >>> round(uniform_sink(9), 6), round(uniform_sink(9, include_query0=True), 6), uniform_sink(1)
    (0.228621, 0.31433, None)
    >>> round(uniform_sink(9, window=3), 6)  # 1/2 from query 1, 1/3 from query 2
    0.416667
    """
    _check(n_tokens, window)
    require_whole("position", position, 0)
    require_flag("include_query0", include_query0)
    return _uniform_sink(n_tokens, include_query0, position, window)


# Called after the checks: a cache takes True for 1, and its error for unhashable values is unclear.
@lru_cache(maxsize=65536)
def _uniform_sink(n_tokens: int, include_query0: bool, position: int, window: int | None) -> float | None:
    first_query = max(position, 0 if include_query0 else 1)
    query_end = n_tokens if window is None else min(n_tokens, position + window)
    if first_query >= query_end:
        return None
    return math.fsum(1 / n_keys for n_keys in _n_visible(first_query, query_end, window)) / (
        query_end - first_query
    )


def uniform_learned_sink(
    n_tokens: int, include_query0: bool = False, window: int | None = None
) -> float | None:
    """Return the mean mass on a learned sink logit if it and all keys that a query sees had the same attention.

    None where no query counts: in a text of one token without query 0.

    >>> round(uniform_learned_sink(3), 4), uniform_learned_sink(1)
    (0.2917, None)
    """
    _check(n_tokens, window)
    require_flag("include_query0", include_query0)
    first_query = 0 if include_query0 else 1
    if first_query >= n_tokens:
        return None
    shares = [1 / (n_keys + 1) for n_keys in _n_visible(first_query, n_tokens, window)]
    return math.fsum(shares) / len(shares)


def n_seeing(n_tokens: int, window: int | None = None) -> Tensor:
    """Return the number of queries that see each key, [key], float64: those from the key on, at most `window`.

    The divisor of a mean over the queries that see a key.

    >>> n_seeing(4).tolist(), n_seeing(4, window=2).tolist()
    ([4.0, 3.0, 2.0, 1.0], [2.0, 2.0, 2.0, 1.0])
    """
    _check(n_tokens, window)
    seeing = torch.arange(n_tokens, 0, -1, dtype=torch.float64)
    return seeing if window is None else seeing.clamp(max=window)


def uniform_sink_rows(n_tokens: int, window: int | None = None) -> Tensor:
    """Return the mass [query] that each query puts on position 0 under uniform attention, float64.

    >>> [round(share, 4) for share in uniform_sink_rows(4, window=3).tolist()]
    [1.0, 0.5, 0.3333, 0.0]
    """
    shares = _shares(n_tokens, window)
    if window is not None:
        shares[window:] = 0.0
    return shares


def uniform_entropy(n_tokens: int, window: int | None = None) -> float:
    """Return the mean row entropy in nats of uniform attention, ln(T!) / T without a window; row 0 counts, as 0.

    >>> round(uniform_entropy(4), 6)
    0.794513
    """
    _check(n_tokens, window)
    return _uniform_entropy(n_tokens, window)


@lru_cache(maxsize=65536)
def _uniform_entropy(n_tokens: int, window: int | None) -> float:
    return math.fsum(math.log(n_keys) for n_keys in _n_visible(0, n_tokens, window)) / n_tokens


def uniform_received(n_tokens: int, window: int | None = None) -> Tensor:
    """Return the mass [key], in queries, that each key receives from uniform attention: H_T − H_k. float64.

    >>> [round(value, 4) for value in uniform_received(3).tolist()]
    [1.8333, 0.8333, 0.3333]
    """
    share = _shares(n_tokens, window)
    from_query_on = torch.cat([share.flip(0).cumsum(0).flip(0), share.new_zeros(1)])
    stop = torch.arange(n_tokens) + (n_tokens if window is None else window)
    return from_query_on[:-1] - from_query_on[stop.clamp(max=n_tokens)]


def uniform_distance(n_tokens: int, window: int | None = None) -> Tensor:
    """Return the mass [distance], in queries, of uniform attention on keys `distance` positions back. float64.

    >>> [round(value, 4) for value in uniform_distance(3, window=2).tolist()]
    [2.0, 1.0, 0.0]
    """
    share = _shares(n_tokens, window)
    mass = share.flip(0).cumsum(0).flip(0)
    if window is not None:
        mass[window:] = 0.0
    return mass


def uniform_window(
    n_tokens: int,
    width: int,
    *,
    include_self: bool = False,
    exclude_first: bool = True,
    window: int | None = None,
) -> Tensor:
    """Return the mass [query] of uniform attention on the `width` keys before a query, as in `window_mass`. float64.

    >>> [round(value, 4) for value in uniform_window(5, 2).tolist()]
    [0.0, 0.0, 0.3333, 0.5, 0.4]
    """
    require_whole("width", width, 0)
    require_flag("include_self", include_self)
    require_flag("exclude_first", exclude_first)
    _check(n_tokens, window)
    query = torch.arange(n_tokens)
    reach = width if window is None else min(width, window - 1)
    first_key = (query - reach).clamp(min=int(exclude_first))
    return (query + int(include_self) - first_key).clamp(min=0) * _shares(n_tokens, window)


def _n_visible(first_query: int, query_end: int, window: int | None) -> list[int]:
    """Return the number of keys that each of the queries first_query … query_end − 1 sees."""
    return [
        query + 1 if window is None else min(query + 1, window) for query in range(first_query, query_end)
    ]


def _shares(n_tokens: int, window: int | None) -> Tensor:
    """Return 1 / (keys seen), [query]."""
    _check(n_tokens, window)
    return torch.tensor(_n_visible(0, n_tokens, window), dtype=torch.float64).reciprocal()


def _check(n_tokens: int, window: int | None) -> None:
    if isinstance(n_tokens, int) and n_tokens < 1:
        raise ValueError(f"expected a text of at least 1 token, received {n_tokens}")
    require_whole("n_tokens", n_tokens, 1)
    if window is not None:
        require_window(window)
