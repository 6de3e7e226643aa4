"""The key other than 0 that queries attend to most, and the scores of uniform attention."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MIN_QUERIES = 8
"""The number of queries that must see a key for it to be a candidate, if the text is long enough."""


def strongest_position(
    received: Tensor, lengths: Tensor, window: int | None = None, min_queries: int = MIN_QUERIES
) -> tuple[Tensor, Tensor]:
    """Return the position and score of the key other than 0 with the highest score, each [batch, head].

    `received` [batch, head, key] is attention mass summed over real queries, and `lengths` is [batch]. A key's score is
    what it receives over the number of queries that see it, which a sliding `window` limits. A mean over few queries is
    mostly noise (only the last query sees the last key), so a key needs `min_queries` queries that see it, or half the
    number that see key 1, if that is less. The first of several keys with equal scores counts. Both are NaN where a
    text has one token or a mass is not finite.

    >>> import torch
    >>> received = torch.tensor([[[2.0, 0.3, 0.6, 0.9]]], dtype=torch.float64)
    >>> strongest_position(received, torch.tensor([4]))
    (tensor([[2.]], dtype=torch.float64), tensor([[0.3000]], dtype=torch.float64))
    """
    import torch

    key = torch.arange(received.shape[-1], device=received.device)
    n_queries = (lengths[:, None] - key)[:, None]
    is_real = n_queries > 0
    max_queries = received.shape[-1] if window is None else window
    n_queries = n_queries.clamp(max=max_queries)
    n_queries_of_key_1 = (lengths - 1).clamp(max=max_queries)[:, None, None]
    has_enough = n_queries >= ((n_queries_of_key_1 + 1) // 2).clamp(max=min_queries)
    scores = torch.where(is_real & (key > 0) & has_enough, received / n_queries.clamp(min=1), -torch.inf)
    score = scores.amax(-1)
    position = scores.argmax(-1).double()
    is_defined = (lengths[:, None] > 1) & torch.where(is_real, received, 0.0).isfinite().all(-1)
    return torch.where(is_defined, position, torch.nan), torch.where(is_defined, score, torch.nan)


@lru_cache(maxsize=1024)
def uniform_scores(length: int, window: int | None) -> np.ndarray:
    """Return the scores [key] of uniform attention: what each key receives over the number of queries that see it."""
    from phaselens.attention import n_seeing, uniform_received

    scores: np.ndarray = (uniform_received(length, window) / n_seeing(length, window)).numpy()
    return scores
