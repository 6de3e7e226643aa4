"""Batches that fit into memory: their size from free memory; and one that does not fit, which is halved once."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.shards import Shard

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

#: The value of `batch_tokens` that asks for a size from free memory.
AUTO = "auto"
DEFAULT_BATCH_TOKENS = 8192
_SMALLEST_BATCH = 512
#: Larger batches are not faster.
_LARGEST_BATCH = {"cpu": DEFAULT_BATCH_TOKENS, "cuda": 32_768}
#: Activations of one layer and token, in float32 numbers per dimension of the residual stream and of the heads: the
#: MLP's, those that hooks copy, and the float32 copies of what half precision computes.
_PER_D_MODEL, _PER_HEAD_DIMENSION = 24, 8


def fitting_batch_tokens(lens: HookedTransformer) -> int:
    """Return the tokens in a batch whose activations take up to half of the device's free memory: a power of two."""
    from phaselens.lens.memory import free_memory

    info = lens.info
    n_bytes = 4 * (_PER_D_MODEL * info.d_model + _PER_HEAD_DIMENSION * info.n_heads * info.d_head)
    n_tokens = free_memory(lens.device) // 2 // n_bytes
    largest = _LARGEST_BATCH.get(lens.device.type, DEFAULT_BATCH_TOKENS)
    power = 1 << max(n_tokens.bit_length() - 1, 0)
    return max(_SMALLEST_BATCH, min(power, largest))


def halved(shard: Shard) -> Shard:
    """Return a shard with the same texts in the same order, and each batch of several texts cut into two.

    >>> halved(Shard(0, (4, 5, 6), ((4, 5), (6,)), 30)).batches
    ((4,), (5,), (6,))
    """
    batches: list[tuple[int, ...]] = []
    for batch in shard.batches:
        middle = (len(batch) + 1) // 2
        batches += [part for part in (batch[:middle], batch[middle:]) if part]
    return replace(shard, batches=tuple(batches))


class BatchHalving:
    """Runs the shards of one model; after a batch that does not fit, in batches of half the size."""

    def __init__(self) -> None:
        self._is_halved = False

    def run(self, shard: Shard, compute: Callable[[Shard], None], renew: Callable[[], bool]) -> bool:
        """Compute a shard, and return whether its batches were halved.

        Args:
            shard: the shard.
            compute: reads all batches of a shard.
            renew: makes `compute` begin anew; returns False if that cannot be done.

        Raises:
            BatchTooLarge: for a batch that does not fit after it was halved, or that cannot be.
        """
        if self._is_halved:
            compute(halved(shard))
            return True
        try:
            compute(shard)
            return False
        except BatchTooLarge as error:
            if halved(shard) == shard or not renew():
                raise
            _release(error)
        self._is_halved = True
        compute(halved(shard))
        return True


def _release(error: BaseException) -> None:
    """Let go of the tensors that the frames of an error hold, and return free memory to the device."""
    import torch

    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
