"""Memory of the process, as far as it decides how fast a forward is."""

from __future__ import annotations

import torch

_BYTES = 31 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what freed tensors leave, up to 64 MB, for the next ones.

    By default it hands most of it back, and the system has to clear each page again when the next layer asks for it:
    with many activations held, several per cent of a pass on a CPU. Its limit follows the largest block that was ever
    freed, so this asks for one, up to where it stops following (32 MB), and frees it; no page of it is touched.
    Another allocator, or a limit from the environment (MALLOC_TRIM_THRESHOLD_), does not notice.
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")
