"""The process' memory: a setting that makes forwards faster, and errors that say that it ran out."""

from __future__ import annotations

import torch

_BYTES = 31 * 2**20


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors, up to 64 MB, for the next ones.

    By default it returns most of it to the system, which has to clear each page again for the next layer: several per
    cent of a pass on a CPU that holds many activations. Its limit follows the largest block that was ever freed, up
    to 32 MB, so this function allocates such a block and frees it, without touching a page. It has no effect on another
    allocator, or if the environment sets a limit (MALLOC_TRIM_THRESHOLD_).
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Some devices raise only a RuntimeError, whose message says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error).lower()
