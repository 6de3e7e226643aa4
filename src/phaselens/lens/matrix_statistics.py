"""The statistics of attention from its matrix, for layers in which the matrix itself is hooked."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def row_lse(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    lse = scores.logsumexp(-1)
    return lse if sink_logits is None else torch.logaddexp(lse, sink_logits.to(lse.dtype)[None, :, None])


def without_pads(pattern: Tensor, real: Tensor | None) -> Tensor:
    """Return the pattern with zeros in the rows of pads."""
    return pattern if real is None else pattern.masked_fill(~real[:, None, :, None], 0.0)


def by_distance(pattern: Tensor, n_distances: int) -> Tensor:
    """Return sums over the diagonals from a query's own key downwards, [batch, head, distance]."""
    own_key = pattern.shape[-1] - pattern.shape[-2]
    sums = [
        pattern.diagonal(own_key - distance, dim1=-2, dim2=-1).sum(-1)
        for distance in range(min(n_distances, pattern.shape[-1]))
    ]
    return nn.functional.pad(torch.stack(sums, -1), (0, n_distances - len(sums)))


def columns(pattern: Tensor, slots: list[int]) -> Tensor:
    """Return the column of each text's slot, [batch, head, query]; zeros where there is none."""
    if len(slots) == 1:
        is_column = 0 <= slots[0] < pattern.shape[-1]
        return pattern[..., slots[0]] if is_column else pattern.new_zeros(pattern.shape[:-1])
    rows = [columns(pattern[row : row + 1], [slot]) for row, slot in enumerate(slots)]
    return torch.cat(rows)
