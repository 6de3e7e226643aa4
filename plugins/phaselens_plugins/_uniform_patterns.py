"""The null values of the metric `attention-patterns`: all quantities of uniform attention."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=1024)
def uniform_pattern(n_tokens: int, window: int | None, width: int) -> dict[str, Tensor]:
    """Return all quantities of uniform attention over 2 or more tokens; `profile` [distance] is a sum over queries."""
    import torch

    from phaselens.attention import (
        concentration,
        uniform_distance,
        uniform_entropy,
        uniform_received,
        uniform_sink,
        uniform_window,
    )

    profile = uniform_distance(n_tokens, window)
    received = uniform_received(n_tokens, window)[None, None]
    local, local_with_bos = (
        uniform_window(n_tokens, width, exclude_first=exclude_bos, window=window).sum() / (n_tokens - 1)
        for exclude_bos in (True, False)
    )
    sees_one_key = window == 1
    return {
        "entropy": torch.tensor(uniform_entropy(n_tokens, window)),
        "entropy_normalised": torch.tensor(torch.nan if sees_one_key else 1.0),
        "concentration": concentration(received, torch.tensor([n_tokens]))[0, 0],
        "sink": torch.tensor(torch.nan if sees_one_key else uniform_sink(n_tokens, window=window)),
        "local": local,
        "itself": (profile[0] - 1.0) / (n_tokens - 1),
        "local_with_bos": local_with_bos,
        "profile": profile,
    }
