"""The masks that transformers builds for the lens' attention, and a recorder of the functions behind them.

transformers describes each mask by a function of (query position, key position), from which it makes the tensor that a
layer's attention gets. A recorder notes which function belongs to the mask of which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

#: Whether a query sees a key: elementwise, of positions that broadcast against each other.
MaskFunction = Callable[[Tensor, Tensor], Tensor]


def elementwise(mask_function: Callable[..., Any]) -> MaskFunction:
    """Return transformers' function of (batch, head, query, key) as a function of the two positions alone."""

    def rule(query: Tensor, key: Tensor) -> Tensor:
        query, key = torch.broadcast_tensors(query, key)
        index = torch.zeros_like(query)  # the first text and the first head
        return torch.as_tensor(mask_function(index, index, query, key)).expand_as(query)

    return rule


class MaskRecorder:
    """Records which mask reached the attention of which module, and the function that decides what the mask hides."""

    def __init__(self) -> None:
        # The tensors are kept, so that no later mask can reuse the memory of an earlier one.
        self._built: list[tuple[Tensor, MaskFunction]] = []
        self._reached: dict[int, Tensor | None] = {}
        self._rules: dict[int, MaskFunction | None] = {}

    def build(
        self, *, mask_function: Callable[..., Any] = causal_mask_function, **arguments: object
    ) -> Tensor | None:
        """Build the mask as `sdpa_mask` does, but also where a causal kernel needs none."""
        mask: Tensor | None = sdpa_mask(
            **{**arguments, "mask_function": mask_function, "allow_is_causal_skip": False}
        )
        if mask is not None:
            self._built.append((mask, elementwise(mask_function)))
        return mask

    def note(self, module: nn.Module, mask: Tensor | None) -> None:
        """Record the mask that the attention function got for `module`."""
        self._reached[id(module)] = mask

    def note_rule(self, module: nn.Module, masks: Sequence[Tensor], rules: Sequence[MaskFunction]) -> None:
        """Record that `module` hides a key that any of these masks or rules hides."""
        built_rules = [self._rule_of(mask) for mask in masks]
        conditions = [*rules, *(rule for rule in built_rules if rule is not None)]

        def sees(query: Tensor, key: Tensor) -> Tensor:
            visible, *more = (condition(query, key) for condition in conditions)
            for other_condition in more:
                visible = visible & other_condition
            return visible

        is_known = None not in built_rules and bool(conditions)
        self._rules[id(module)] = sees if is_known else None

    def rule(self, module: nn.Module) -> MaskFunction | None:
        """Return the mask function of `module`; None if its mask was built in an unknown way."""
        if id(module) in self._rules:
            return self._rules[id(module)]
        mask = self._reached[id(module)]
        return elementwise(causal_mask_function) if mask is None else self._rule_of(mask)

    def _rule_of(self, mask: Tensor) -> MaskFunction | None:
        memory = mask.untyped_storage().data_ptr()
        for built, rule in self._built:
            if built.untyped_storage().data_ptr() == memory:
                return rule
        return None


_RECORDER: ContextVar[MaskRecorder | None] = ContextVar("phaselens_mask_recorder", default=None)


def build_mask(
    *, mask_function: Callable[..., Any] = causal_mask_function, **arguments: object
) -> Tensor | None:
    """Build the mask for the lens' attention as transformers' `sdpa_mask` does; transformers calls this."""
    recorder = _RECORDER.get()
    build = sdpa_mask if recorder is None else recorder.build
    mask: Tensor | None = build(mask_function=mask_function, **arguments)
    return mask


def note_mask(module: nn.Module, mask: Tensor | None) -> None:
    """Record the mask that the attention of `module` got, while a recorder is active."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.note(module, mask)


def note_rule(module: nn.Module, masks: Sequence[Tensor], rules: Sequence[MaskFunction]) -> None:
    """Record what hides keys from a module that combines masks itself, while a recorder is active."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.note_rule(module, masks, rules)


@contextmanager
def recording() -> Iterator[MaskRecorder]:
    """Activate a new recorder inside the context."""
    recorder = MaskRecorder()
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def selected_keys(mask: Tensor | None, indices: Tensor, n_keys: int) -> Tensor:
    """Return a mask that hides the keys that were not selected as well.

    Args:
        mask: [batch, 1, query, key], bool (True where visible) or additive; None for causal attention.
        indices: [batch, query, choice], the keys that were selected for each query.
        n_keys: the number of keys.
    """
    shape = (*indices.shape[:2], n_keys)
    selected = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter(-1, indices.long(), True)
    selected = selected[:, None]
    if mask is None:
        n_queries = shape[1]
        causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=indices.device)
        return selected & causal.tril(n_keys - n_queries)
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)
