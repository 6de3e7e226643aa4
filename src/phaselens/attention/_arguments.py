"""Checks of the arguments of attention's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.errors import InputError, require_tensor, require_whole, type_unless_whole


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


def require_query_and_key_states(q: Tensor, k: Tensor) -> int:
    """Return the number of query heads for each key head; raise InputError for shapes that do not fit."""
    require_tensor("q", q, "pos", "head", "d_head")
    require_tensor("k", k, "pos", "kv_head", "d_head")
    if (
        not q.numel()
        or not k.numel()
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise InputError(
            "expected k [pos, kv_head, d_head] with q's positions and d_head, its heads dividing q's, "
            f"received q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    return q.shape[1] // k.shape[1]


def all_finite(states: Tensor) -> bool:
    """Return whether every number is finite, also where there are none.

    The extremes are NaN or infinite if any number is, and take a tenth of the time of `isfinite`.

    >>> all_finite(torch.tensor([1.0, torch.inf])), all_finite(torch.zeros(0))
    (False, True)
    """
    require_tensor("states", states)
    return not states.numel() or bool(torch.stack(states.aminmax()).isfinite().all())
