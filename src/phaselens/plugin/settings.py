"""Settings of the whole process that a plugin may change for itself, and for nobody else."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class _Setting(NamedTuple):
    """How a setting is read and written, and what it is in a process that has just started (None: it depends)."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    initial: Any = None


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Put back at the end what a plugin changes inside: PyTorch's default dtype and device, gradient mode, threads,
    precision, kernels, autocast and determinism, and NumPy's handling of floating-point errors. All of them change
    what other metrics compute, or whether they can.
    """
    before = _read()
    try:
        yield
    finally:
        after = _read()
        if after != before:
            _write(before, after)


def _read() -> tuple[Any, ...] | None:
    """The values of all settings; None while nobody has imported PyTorch."""
    if not hasattr(sys.modules.get("torch"), "get_default_dtype"):
        return None
    return tuple(setting.read() for setting in _settings())


def _write(before: tuple[Any, ...] | None, after: tuple[Any, ...] | None) -> None:
    settings = _settings()
    wanted = before or tuple(setting.initial for setting in settings)
    for setting, value, current in zip(settings, wanted, after or (), strict=True):
        if value is not None and value != current:
            setting.write(value)


@functools.cache
def _settings() -> tuple[_Setting, ...]:
    import numpy as np
    import torch

    kernels = torch.backends.cuda  # they hold for the CPU as well
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return (
        _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _Setting(torch.get_default_device, _set_default_device, torch.device("cpu")),
        _Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        _Setting(torch.get_num_threads, torch.set_num_threads),
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _Setting(
            _determinism, lambda given: torch.use_deterministic_algorithms(given[0], warn_only=given[1])
        ),
        _Setting(lambda: torch.backends.mkldnn.enabled, torch.backends.mkldnn.set_flags),
        _Setting(kernels.flash_sdp_enabled, kernels.enable_flash_sdp, True),
        _Setting(kernels.mem_efficient_sdp_enabled, kernels.enable_mem_efficient_sdp, True),
        _Setting(kernels.math_sdp_enabled, kernels.enable_math_sdp, True),
        _Setting(kernels.cudnn_sdp_enabled, kernels.enable_cudnn_sdp, True),
        *(
            _Setting(
                functools.partial(torch.is_autocast_enabled, device),
                functools.partial(torch.set_autocast_enabled, device),
                False,
            )
            for device in devices
        ),
        _Setting(np.geterr, lambda given: np.seterr(**given)),
    )


def _set_default_device(device: Any) -> None:
    """Without a default device tensors are made on the CPU; to set that one by name would slow down every call."""
    import torch

    torch.set_default_device(None if device.type == "cpu" else device)


def _determinism() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
