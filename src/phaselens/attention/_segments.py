"""Where each query looks: its attention on segments of the keys, and the key with its largest weight."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from phaselens.attention._problem import SoftmaxOptions
from phaselens.attention._statistics import summarise


def segment_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: Tensor,
    *,
    n_segments: int | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Return the attention mass [batch, head, query, segment] of each query on each segment of keys, a fraction of 1.

    segments [batch | 1, key] holds the segment of each key, from 0; −1 for a key in none. `n_segments` is by default
    the largest plus 1. Memory O(query · segment). Options and errors as in
    `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> mass = segment_mass(x, x, lse, torch.tensor([[0, 1, 1, 0]]), scale=1.0)
    >>> mass[0, 0, 3].tolist()
    [0.5, 0.5]
    """
    mass = summarise(q, k, lse, segments=segments, n_segments=n_segments, **options).segments
    assert mass is not None
    return mass


def top_keys(q: Tensor, k: Tensor, lse: Tensor, **options: Unpack[SoftmaxOptions]) -> tuple[Tensor, Tensor]:
    """Return the key with the largest weight of each query, and the number of keys that share it: [batch, head, query].

    Weights that differ by 1e-5 of themselves or less are equal, and the first of equals is returned. Both are floats,
    NaN for a query that sees nothing. Options and errors as in
    `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.tensor([1.0, 3.0, 2.0, 3.0]).view(1, 1, 4, 1)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [values.flatten().tolist() for values in top_keys(x, x, lse, scale=1.0)]
    [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]]
    """
    top = summarise(q, k, lse, top=True, **options).top
    assert top is not None
    key, count = top.unbind(-1)
    return key, count
