"""The process' memory: settings that speed up forwards and loading, its peak, and errors that say that it ran out."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import psutil
import torch
from torch import nn

# Parameters of glibc's mallopt, and their values. 32 MB is the largest size of blocks that it keeps rather than maps.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BLOCK = 256 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors of up to 32 MB, 256 MB in all, for the next ones.

    By default it returns most of it to the system, which has to clear each page again for the next layer: up to a tenth
    of a pass on a CPU. It has no effect on another allocator, or if the environment sets a limit
    (MALLOC_TRIM_THRESHOLD_).
    """
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Postpone Python's collection of cycles, which would look at every object of all imported libraries again each
    time that many small ones are made, to the end of the context."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_followed: list[tuple[weakref.ref[nn.Module], list[weakref.ref[nn.Parameter]]]] = []
"""Modules, and the weights that should leave memory with each."""
_following = threading.Lock()
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def followed(module: ModuleT) -> ModuleT:
    """Return the module; the next `collect_dropped` looks whether its weights left memory with it."""
    weights = [weakref.ref(weight) for weight in module.parameters()]
    with _following:
        _followed.append((weakref.ref(module), weights))
    return module


def collect_dropped() -> None:
    """Collect cycles if a module that was followed is gone, but not its weights.

    Some of TransformerLens' adapters make cycles (Granite, Phi-3, GPT-NeoX); Python may not collect these for minutes.
    """
    with _following:
        dropped = [entry for entry in _followed if entry[0]() is None]
        for entry in dropped:
            _followed.remove(entry)
    if any(weight() is not None for _, weights in dropped for weight in weights):
        gc.collect()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Some devices raise only a RuntimeError, whose message says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error).lower()


def available_memory(device: torch.device) -> int:
    """Return the bytes that the process can have on a device: those that are free, and those that it has already."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available) + _resident()


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device for further tensors."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Measures, inside `with`, the process' largest memory on a device: `n_bytes`. On a CPU, it looks every few ms."""

    _INTERVAL_SECONDS = 0.005

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.n_bytes = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.n_bytes = max(self.n_bytes, _resident())
            if self._ended.wait(self._INTERVAL_SECONDS):
                return

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        else:
            self.n_bytes = int(torch.cuda.max_memory_allocated(self._device))
