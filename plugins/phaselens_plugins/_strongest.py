"""The key other than 0 that queries attend to most, and what uniform attention gives each key."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MIN_QUERIES = 8
"""Queries that must see a key for its mean to be compared with those of others, where a text has as many."""


def strongest_position(
    received: Tensor, lengths: Tensor, window: int | None = None, min_queries: int = MIN_QUERIES
) -> tuple[Tensor, Tensor]:
    """received [batch, head, key], attention mass summed over real queries, lengths [batch] → two [batch,
    head].

    The key other than 0 with the highest score, and that score: what the key receives over the number of queries that
    see it, which a sliding `window` limits. A mean over few queries is mostly chance, and the last key is seen by
    itself alone: keys that fewer than `min_queries` see are left out, or fewer than half of those that see key 1, if
    that is less. Of keys with equal scores, the first. NaN where a text has one token, or where a mass is not finite.

    >>> import torch
    >>> received = torch.tensor([[[2.0, 0.3, 0.6, 0.9]]], dtype=torch.float64)
    >>> strongest_position(received, torch.tensor([4]))
    (tensor([[2.]], dtype=torch.float64), tensor([[0.3000]], dtype=torch.float64))
    """
    import torch

    key = torch.arange(received.shape[-1], device=received.device)
    seeing = (lengths[:, None] - key)[:, None]
    real = seeing > 0
    most = received.shape[-1] if window is None else window
    seeing = seeing.clamp(max=most)
    see_key_1 = (lengths - 1).clamp(max=most)[:, None, None]
    enough = seeing >= ((see_key_1 + 1) // 2).clamp(max=min_queries)
    scores = torch.where(real & (key > 0) & enough, received / seeing.clamp(min=1), -torch.inf)
    score = scores.amax(-1)
    position = scores.argmax(-1).double()
    usable = (lengths[:, None] > 1) & torch.where(real, received, 0.0).isfinite().all(-1)
    return torch.where(usable, position, torch.nan), torch.where(usable, score, torch.nan)


@lru_cache(maxsize=1024)
def uniform_scores(length: int, window: int | None) -> np.ndarray:
    """Score [key] of uniform attention: what each key receives over the queries that see it."""
    from phaselens.attention import n_seeing, uniform_received

    scores: np.ndarray = (uniform_received(length, window) / n_seeing(length, window)).numpy()
    return scores
