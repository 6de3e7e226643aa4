"""Batches of texts of like length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

from phaselens.errors import require_whole, require_wholes

#: Pads are computed and thrown away. A batch ends where they would be more than a quarter of its tokens, unless it
#: is small, when another forward would cost more than its pads.
MOST_PADS = 0.25
SMALL = 512


def pack(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in batches of at most `batch_tokens` tokens, pads included (one text may be
    longer).

    The longest come first: what does not fit into memory says so at once.

    >>> pack([3, 9, 4, 8], batch_tokens=18)
    [[1, 3], [2, 0]]
    """
    require_wholes("lengths", lengths, 0)
    require_whole("batch_tokens", batch_tokens, 1)
    batches: list[list[int]] = []
    n_real = 0
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        n_real += lengths[index]
        if batches:
            n_tokens = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            if n_tokens <= batch_tokens and (n_tokens <= SMALL or n_tokens - n_real <= MOST_PADS * n_tokens):
                batches[-1].append(index)
                continue
        batches.append([index])
        n_real = lengths[index]
    return batches
