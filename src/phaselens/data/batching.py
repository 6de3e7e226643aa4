"""Batches of texts of like length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in batches of at most `batch_tokens` tokens, pads included (one text may be
    longer).

    The longest come first: what does not fit into memory says so at once.

    >>> pack([3, 9, 4, 8], batch_tokens=18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
