"""The masks that transformers builds for the lens' attention, and a recorder of what they say.

transformers describes each mask by a function of (query position, key position), from which it makes the tensor that a
layer's attention gets. A recorder notes which function belongs to the mask of which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

#: Whether a query sees a key, elementwise, of positions that broadcast against each other.
Rule = Callable[[Tensor, Tensor], Tensor]


def elementwise(mask_function: Callable[..., Any]) -> Rule:
    """transformers' function of (batch, head, query, key) as a function of the two positions alone."""

    def rule(query: Tensor, key: Tensor) -> Tensor:
        query, key = torch.broadcast_tensors(query, key)
        first = torch.zeros_like(query)
        return torch.as_tensor(mask_function(first, first, query, key)).expand_as(query)

    return rule


class MaskRecorder:
    """Which mask reached the attention of which module, and the function that says what the mask hides."""

    def __init__(self) -> None:
        # The tensors are kept, so that no later mask can be given the memory of an earlier one.
        self._built: list[tuple[Tensor, Rule]] = []
        self._reached: dict[int, Tensor | None] = {}

    def build(self, **arguments: Any) -> Tensor | None:
        """As `sdpa_mask`, but never leaving the mask out where a causal kernel would do without."""
        mask: Tensor | None = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
        function = arguments.get("mask_function", causal_mask_function)
        if mask is not None:
            self._built.append((mask, elementwise(function)))
        return mask

    def note(self, module: Any, mask: Tensor | None) -> None:
        """Called by the attention function: `mask` is what it got for `module`."""
        self._reached[id(module)] = mask

    def rule(self, module: Any) -> Rule | None:
        """What the queries of `module` see; None where its mask was made in a way that is not known."""
        mask = self._reached[id(module)]
        if mask is None:
            return elementwise(causal_mask_function)
        memory = mask.untyped_storage().data_ptr()
        for built, rule in self._built:
            if built.untyped_storage().data_ptr() == memory:
                return rule
        return None


_RECORDER: ContextVar[MaskRecorder | None] = ContextVar("phaselens_mask_recorder", default=None)


def build_mask(**arguments: Any) -> Tensor | None:
    """The mask function that transformers calls for the lens' attention: its own `sdpa_mask`."""
    recorder = _RECORDER.get()
    return sdpa_mask(**arguments) if recorder is None else recorder.build(**arguments)


def note_mask(module: Any, mask: Tensor | None) -> None:
    """Tell a running probe which mask the attention of `module` got."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.note(module, mask)


@contextmanager
def recording() -> Iterator[MaskRecorder]:
    recorder = MaskRecorder()
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)
