"""Bins of positions that double in width, and the means of a text's values in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from phaselens.plugin import Column

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

N_OCTAVES = 24
"""Bins end at position 2 ** N_OCTAVES."""

FIRST = Column("first", int, "position", "first position of the bin")
LAST = Column("last", int, "position", "last position of the bin")
BEYOND = Column(
    "beyond",
    float,
    "share of positions",
    "positions of the bin beyond the length that the model was trained for; missing if that is unknown",
)


@dataclass(frozen=True)
class PositionBins:
    """Bins of the positions 1, 2, …: `per_octave` of them for each doubling; position 0 is in none.

    >>> PositionBins(1).edges[:5], PositionBins(2).edges[:8]
    ((1, 2, 4, 8, 16), (1, 2, 3, 4, 6, 8, 11, 16))
    """

    per_octave: int = 1

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """The first position of each bin, and the end of the last one."""
        steps = range(N_OCTAVES * self.per_octave + 1)
        return tuple(sorted({round(2 ** (step / self.per_octave)) for step in steps}))

    @property
    def n(self) -> int:
        """The number of bins."""
        return len(self.edges) - 1

    def n_reached(self, n_tokens: int) -> int:
        """Return the number of bins with a position of a text of `n_tokens`."""
        import bisect

        return min(self.n, bisect.bisect_left(self.edges, n_tokens))

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the first and the last position of a bin."""
        return self.edges[index], self.edges[index + 1] - 1

    def beyond(self, index: int, n_trained: int | None) -> float | None:
        """Return the share of the bin's positions at or after `n_trained`; None if that is unknown.

        >>> PositionBins(1).beyond(3, 12), PositionBins(1).beyond(2, 12)
        (0.5, 0.0)
        """
        if n_trained is None:
            return None
        first, last = self.bounds(index)
        return min(1.0, max(0, last + 1 - n_trained) / (last + 1 - first))

    def label(self, index: int) -> str:
        """Return the bin's positions, for the name of a row.

        >>> [PositionBins(1).label(index) for index in (0, 3)]
        ['1', '8–15']
        """
        first, last = self.bounds(index)
        return str(first) if first == last else f"{first}–{last}"

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means [..., bin] of values [..., pos] over each bin's positions, and how many it has, [..., bin].

        Values are those of positions 0, 1, …; NaN marks a missing one, and the mean of a bin without any value.

        >>> import torch
        >>> means, counts = PositionBins(1).means(torch.tensor([9.0, 1.0, 2.0, float("nan"), 5.0]))
        >>> means[:4].tolist(), counts[:4].tolist()
        ([1.0, 2.0, 5.0, nan], [1.0, 1.0, 1.0, 0.0])
        """
        import torch

        position = torch.arange(values.shape[-1], device=values.device)
        edges = torch.tensor(self.edges, device=values.device)
        # Position 0 and positions after the last bin go into one more bin, which is dropped.
        index = torch.bucketize(position, edges, right=True) - 1
        index = torch.where((index < 0) | (index >= self.n), self.n, index)
        present = ~values.isnan()
        wide = torch.where(present, values, 0.0).double()
        shape = (*values.shape[:-1], self.n + 1)
        totals = wide.new_zeros(shape).index_add_(-1, index, wide)[..., :-1]
        counts = wide.new_zeros(shape).index_add_(-1, index, present.double())[..., :-1]
        return torch.where(counts > 0, totals / counts, torch.nan), counts


def pooled_means(means: np.ndarray, counts: np.ndarray, bins: Sequence[int]) -> np.ndarray:
    """Return the mean over several bins of means [..., bin], weighted by counts [..., bin]; NaN without any value."""
    import numpy as np

    chosen = list(bins)
    weights = counts[..., chosen]
    total = np.where(weights > 0, means[..., chosen] * weights, 0.0).sum(-1)
    n_values = weights.sum(-1)
    pooled: np.ndarray = np.divide(total, n_values, out=np.full(np.shape(total), np.nan), where=n_values > 0)
    return pooled
