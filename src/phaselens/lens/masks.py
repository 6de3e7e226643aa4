"""The masks that transformers builds for the lens' attention, and a recorder of the functions behind them.

transformers describes each mask by a function of (query position, key position), from which it makes the tensor that a
layer's attention gets. A recorder notes which function belongs to the mask of which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_N_TOKENS = 7
# The two texts are rows of one product, which may round them in different ways.
_ROUNDINGS = 64
# The variable in transformers' overlay that holds the block of each token, -1 for none.
_BLOCKS = "block_sequence_ids"

#: Whether a query sees a key: elementwise, of positions that broadcast against each other.
MaskFunction = Callable[[Tensor, Tensor], Tensor]


def elementwise(mask_function: Callable[..., Any]) -> MaskFunction:
    """Return transformers' function of (batch, head, query, key) as a function of the two positions alone."""
    mask_function = _without_blocks(mask_function)

    def rule(query: Tensor, key: Tensor) -> Tensor:
        query, key = torch.broadcast_tensors(query, key)
        index = torch.zeros_like(query)  # the first text and the first head
        return torch.as_tensor(mask_function(index, index, query, key)).expand_as(query)

    return rule


def _without_blocks(mask_function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mask function without transformers' overlays of blocks, such as images, if no token is in a block.

    An overlay reads the block of each token from a tensor as long as the text, so it cannot be evaluated further on.
    """
    if not isinstance(mask_function, FunctionType) or not mask_function.__closure__:
        return mask_function
    names = mask_function.__code__.co_freevars
    values = {name: cell.cell_contents for name, cell in zip(names, mask_function.__closure__, strict=True)}
    blocks = values.get(_BLOCKS)
    if isinstance(blocks, Tensor):
        return mask_function if bool((blocks >= 0).any()) else _in_no_block
    cells = tuple(CellType(_without_blocks_inside(value)) for value in values.values())
    return FunctionType(
        mask_function.__code__,
        mask_function.__globals__,
        mask_function.__name__,
        mask_function.__defaults__,
        cells,
    )


def _without_blocks_inside(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_blocks_inside, value))
    return _without_blocks(value) if isinstance(value, FunctionType) else value


def _in_no_block(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return False for every pair: no two tokens are in one block."""
    return torch.zeros_like(torch.broadcast_tensors(query, key)[0], dtype=torch.bool)


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

    @property
    def common_rule(self) -> MaskFunction | None:
        """The mask function of every mask that was built; None if there were several, the causal one without any."""
        rules = {id(rule): rule for _, rule in self._built}
        if not rules:
            return elementwise(causal_mask_function)
        return next(iter(rules.values())) if len(rules) == 1 else None

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


def state_causality(model: PreTrainedModel) -> None:
    """Let the attention modules of a causal model state that they are causal, where they state the contrary.

    Modules of encoder-decoders may do so because their model always passes them a mask (BigBird-Pegasus). Whether the
    model is causal is measured: a change of the last token must not reach the logits before it.
    """
    modules = [module for module in model.modules() if getattr(module, "is_causal", None) is False]
    if not modules:
        return
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(2 * _N_TOKENS, device=device).view(2, -1) % len(model.get_input_embeddings().weight)
    tokens[1, :-1] = tokens[0, :-1]
    with torch.no_grad():
        first, second = model(tokens, use_cache=False).logits[:, :-1]
    gap, scale = float((first - second).abs().max()), float(first.abs().max())
    if gap <= _ROUNDINGS * torch.finfo(first.dtype).eps * scale:
        for module in modules:
            module.is_causal = True


def without_bias(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the bool mask (None: causal) and the bias [batch, head, 1 | query, key] that an additive mask consists of.

    Args:
        mask: [batch, head, query, key], at its dtype's lowest number (or −inf) where a key is hidden.
    """
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    n_queries, n_keys = mask.shape[-2:]
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=mask.device).tril(n_keys - n_queries)
    visible = None if bool((hidden == ~causal).all()) else ~hidden
    bias = mask.masked_fill(hidden, 0.0)
    if not bool(bias.any()):
        return visible, None
    by_key = mask.masked_fill(hidden, -torch.inf).amax(-2, keepdim=True)
    is_by_key = bool(((bias == by_key) | hidden).all())
    return visible, by_key.masked_fill(by_key == -torch.inf, 0.0) if is_by_key else bias


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
