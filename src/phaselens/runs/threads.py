"""The number of CPU threads of a run, which decides in which order some sums are added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def current_threads() -> int:
    """Return the number of threads that PyTorch uses now: the cores of the machine, or OMP_NUM_THREADS."""
    import torch

    return torch.get_num_threads()


@contextlib.contextmanager
def fixed_threads(n_threads: int) -> Iterator[None]:
    """Compute with this many threads inside, in PyTorch and in the BLAS of NumPy and SciPy.

    The number is part of a run's protocol: a product of matrices, or the sum of a large tensor, is rounded differently
    when it is split among another number of threads. More threads than cores are possible, and give the same numbers.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    # Even if the number is the same: PyTorch then keeps MKL from using fewer on a machine with fewer cores.
    torch.set_num_threads(n_threads)
    try:
        with threadpool_limits(limits=n_threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
