"""Settings of the whole process that a plugin may change while it runs, and that are restored afterwards."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class _Setting(NamedTuple):
    """Functions that read and write a setting, and its value in a new process (None: it depends on the machine)."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    initial: object = None


@contextlib.contextmanager
def preserved_settings() -> Iterator[None]:
    """Restore on exit the settings that a plugin changes inside: PyTorch's default dtype and device, gradient mode,
    threads, precision, kernels, autocast and determinism, and NumPy's handling of floating-point errors. All of them
    affect what other metrics compute, or whether they can.
    """
    before = _read_settings()
    try:
        yield
    finally:
        after = _read_settings()
        if after != before:
            _restore(before, after)


def _read_settings() -> tuple[object, ...] | None:
    """Return the values of all settings; None while PyTorch is not imported."""
    if not hasattr(sys.modules.get("torch"), "get_default_dtype"):
        return None
    return tuple(setting.read() for setting in _settings())


def _restore(before: tuple[object, ...] | None, after: tuple[object, ...] | None) -> None:
    settings = _settings()
    previous = before or tuple(setting.initial for setting in settings)
    for setting, value, current in zip(settings, previous, after or (), strict=True):
        if value is not None and value != current:
            setting.write(value)


@functools.cache
def _settings() -> tuple[_Setting, ...]:
    import numpy as np
    import torch

    kernels = torch.backends.cuda  # these settings apply to the CPU too
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return (
        _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _Setting(torch.get_default_device, _set_default_device, torch.device("cpu")),
        _Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        _Setting(torch.get_num_threads, torch.set_num_threads),
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _Setting(
            _determinism, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])
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
        _Setting(np.geterr, lambda value: np.seterr(**value)),
    )


def _set_default_device(device: torch.device) -> None:
    """Set PyTorch's default device. The CPU is set as None: naming it would slow down every call."""
    import torch

    torch.set_default_device(None if device.type == "cpu" else device)


def _determinism() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
