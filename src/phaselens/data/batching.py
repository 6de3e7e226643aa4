"""Group texts of similar length into batches, so that there is little padding."""

from __future__ import annotations

from collections.abc import Sequence

from phaselens.errors import require_whole, require_wholes

#: Largest share of pads in a batch, because pads cost computation.
MAX_PAD_SHARE = 0.25
#: Batches of up to this many tokens can hold more pads, because another forward would cost more than they do.
SMALL_BATCH = 512


def pack(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the indices of `lengths` in batches of at most `batch_tokens` tokens, pads included.

    A single text can be longer. The longest texts come first, so that a batch that does not fit into memory fails at
    once.

    >>> pack([3, 9, 4, 8], batch_tokens=18)
    [[1, 3], [2, 0]]
    """
    require_wholes("lengths", lengths, 0)
    require_whole("batch_tokens", batch_tokens, 1)
    batches: list[list[int]] = []
    n_real = 0
    for index in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        n_real += lengths[index]
        if batches:
            n_tokens = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            has_few_pads = n_tokens <= SMALL_BATCH or n_tokens - n_real <= MAX_PAD_SHARE * n_tokens
            if n_tokens <= batch_tokens and has_few_pads:
                batches[-1].append(index)
                continue
        batches.append([index])
        n_real = lengths[index]
    return batches
