"""Checks of the arguments of attention's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.errors import InputError, require_whole, type_unless_whole


def require_key_indices(name: str, keys: object, n_texts: int) -> None:
    """Raise InputError unless `keys` is a tensor [batch | 1, n] of whole numbers."""
    received = type_unless_whole(keys)
    if received:
        raise InputError(f"expected {name} [batch | 1, n] as a tensor of whole numbers, received {received}")
    assert isinstance(keys, Tensor)
    if keys.ndim != 2 or keys.shape[0] not in (1, n_texts):
        raise InputError(f"expected {name} [batch | 1, n] for {n_texts} texts, received {shape_of(keys)}")


def require_window(window: object) -> None:
    if isinstance(window, int) and not isinstance(window, bool) and window < 1:
        raise InputError(f"expected a window of at least 1 key (the query's own), received {window}")
    require_whole("window", window, 1)


def require_no_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a gradient is needed: autograd would record nothing, and the gradient be silently wrong."""
    if torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors
    ):
        raise RuntimeError(
            f"{name} streams through kernels whose log-sum-exp has no gradient; call it under "
            "torch.no_grad(), or use phaselens.attention.explicit, which is differentiable"
        )


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
