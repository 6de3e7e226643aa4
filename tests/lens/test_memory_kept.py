"""Memory of freed tensors is kept for the next ones."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from phaselens.lens.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own rules")
@pytest.mark.parametrize("megabytes", [5, 22])
def test_freed_tensors_leave_pages_for_the_next_ones(monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    keep_freed_memory()

    def faults() -> int:
        """The pages that the system had to clear for tensors of 110 MB in all."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(megabytes << 18) for _ in range(110 // megabytes)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(5)) < 2_000  # of 27,000
