"""Masks that are not built, for attention modules that add a mask to the scores that they compute themselves.

transformers makes such a module's mask as a matrix [batch, 1, query, key] of numbers. A `LazyMask` stands for it, and
becomes that matrix only in operations that need its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from phaselens.lens.masks import build_mask


@dataclass(frozen=True, eq=False)
class LazyMask:
    """An additive mask [batch, 1, query, key]: the dtype's lowest number where a key is hidden, else 0 or `bias`.

    ``visible`` is True where a key is visible; None for the causal mask, whose last query is at the last key.
    ``marks_hidden``: the mask is a bool one, True where a key is hidden. ``bias`` broadcasts against the mask.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    visible: Tensor | None
    marks_hidden: bool = False
    bias: Tensor | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the sizes, as `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert the dtype, as `Tensor.to`; in a bool mask, numbers other than 0 become True, which hides."""
        target = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if target is torch.bool and self.bias is None:
            return replace(self, dtype=torch.bool, marks_hidden=True)
        if target is None or (target.is_floating_point and not self.marks_hidden):
            return replace(self, dtype=target or self.dtype)
        return self.built().to(*args, **kwargs)

    def bool(self) -> Any:
        """Convert to a bool mask, True where a key is hidden."""
        return self.to(torch.bool)

    def __lt__(self, bound: Any) -> Any:
        """Return which keys are hidden, for a bound between 0 and the number that hides."""
        is_between = isinstance(bound, int | float) and torch.finfo(self.dtype).min < bound < 0
        if is_between and self.bias is None and not self.marks_hidden:
            return self.to(torch.bool)
        return self.built() < bound

    def __getitem__(self, index: Any) -> Any:
        """Return a part of the mask: itself, if the slices leave out nothing."""
        items = index if isinstance(index, tuple) else (index,)
        is_all = all(
            isinstance(item, slice) and item.indices(size) == (0, size, 1)
            for item, size in zip(items, self.shape, strict=False)
        )
        return self if is_all else self.built()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.built(), name)

    def built_visible(self) -> Tensor:
        """Return the bool mask [batch | 1, 1, query, key], True where a key is visible."""
        if self.visible is not None:
            return self.visible
        n_queries, n_keys = self.shape[-2:]
        causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=self.device).tril(n_keys - n_queries)
        return causal[None, None]

    def built(self) -> Tensor:
        """Return the mask as a tensor."""
        visible = self.built_visible()
        if self.marks_hidden:
            return ~visible.expand(self.shape)
        lowest = torch.finfo(self.dtype).min
        cells = torch.zeros((), dtype=self.dtype, device=self.device) if self.bias is None else self.bias
        return torch.where(visible, cells, lowest)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.strip("_") == "masked_fill" and not kwargs:
            filled, mask, value = args
            is_lowest = isinstance(filled, Tensor) and value == torch.finfo(filled.dtype).min
            if isinstance(mask, LazyMask) and mask.marks_hidden and is_lowest:
                shape = torch.broadcast_shapes(filled.shape, mask.shape)
                return replace(mask, shape=shape, dtype=filled.dtype, marks_hidden=False, bias=filled)
        return func(
            *(_built(value) for value in args), **{name: _built(value) for name, value in kwargs.items()}
        )


def _built(value: Any) -> Any:
    return value.built() if isinstance(value, LazyMask) else value


def build_lazy_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    dtype: torch.dtype = torch.float32,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **arguments: Any,
) -> LazyMask:
    """Describe the mask that transformers' `eager_mask` would build; transformers calls this."""
    visible = build_mask(
        mask_function=mask_function,
        # A caller that needs the causal mask itself gets it from `LazyMask.built`.
        allow_is_causal_skip=allow_is_causal_skip or mask_function is causal_mask_function,
        **arguments,
    )
    shape = torch.Size((arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"]))
    return LazyMask(shape, dtype, torch.device(arguments.get("device") or "cpu"), visible)
