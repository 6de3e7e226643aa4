"""Edits of the scores of named keys, `hook_key_scores`, without the matrix.

A hook names its keys by being a `KeyHook`; any other function receives the scores on the requested key
(`sink_position`). The hooks of one layer can name different keys: the point fires once, with a column for each key, and
every `KeyHook` sees the columns of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phaselens import attention
from phaselens.errors import InputError
from phaselens.lens.attention_owner import AttentionOwner, is_hooked, version_of
from phaselens.lens.points import HookFunction
from phaselens.lens.slots import KernelOptions, KeySlots

_POSITIONS = "key_positions"
"""The entry of the hook point's context with the positions [batch or 1, key] of its columns."""


@dataclass(frozen=True, eq=False)
class KeyHook:
    """A hook function on the scores [batch, head, query, n] of the keys at the absolute `positions` [batch or 1, n].

    Position −1 stands for no key.
    """

    function: HookFunction
    positions: Tensor

    def __call__(self, scores: Tensor, hook: Any) -> Tensor | None:
        """Call the function with the columns of its keys, and write the columns that it returns."""
        columns: Tensor = hook.ctx[_POSITIONS]
        own = self.positions.to(columns.device)
        index = (columns[:, None, :] == own[:, :, None]).int().argmax(-1)
        index = index[:, None, None, :].expand(len(scores), *scores.shape[1:3], -1)
        returned = self.function(scores.gather(-1, index), hook)
        return None if returned is None else scores.scatter(-1, index, returned)


@dataclass(frozen=True)
class KeyEdit:
    """The scores of the keys at `indices` [batch or 1, n] in one layer, before and after their edits; both
    [batch, head, query, n]."""

    indices: Tensor
    scores: Tensor
    edited: Tensor
    #: Whether gradients reach all of the columns through the matrix, not only the edited cells.
    keeps_gradient: bool = False

    def written_to(self, matrix: Tensor) -> Tensor:
        """Return the scores [batch, head, query, key] with the edited columns in place of their own."""
        index = torch.where(self.indices < 0, 0, self.indices)[:, None, None, :].expand(self.edited.shape)
        is_key = (self.indices >= 0)[:, None, None, :]
        unchanged = ~is_key | self._is_unchanged()
        # Cells that keep their score keep its rounding, and columns that stand for no key write nothing.
        for column in range(index.shape[-1]):
            cells = index[..., column : column + 1]
            own = matrix.gather(-1, cells)
            new = torch.where(
                unchanged[..., column : column + 1],
                own,
                self.edited[..., column : column + 1].to(matrix.dtype),
            )
            if self.keeps_gradient:
                # The matrix's own number, with the gradient of the edited column.
                scores = self.edited[..., column : column + 1]
                carried = own.detach() + (scores - scores.detach()).to(matrix.dtype)
                is_carried = unchanged[..., column : column + 1] & is_key[..., column : column + 1]
                new = torch.where(is_carried & own.isfinite(), carried, new)
            matrix = matrix.scatter(-1, cells, new)
        return matrix

    def _is_unchanged(self) -> Tensor:
        return self.edited == self.scores

    def output(
        self,
        owner: AttentionOwner,
        attend: Callable[[Tensor, Tensor, Tensor, KernelOptions], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: KernelOptions,
    ) -> Tensor:
        """Return attention's output [batch, query, head, d_head] after the edits; `attend` computes that before them.

        What heads read from the other keys is computed in the groups of heads that the edits change, and the output
        before the edits only if some of its rows stay.
        """
        group = query.shape[1] // key.shape[1]
        by_head = (~self._is_unchanged()).any(-1).any(-1).any(0)
        kv_heads = by_head.view(-1, group).any(-1).nonzero()[:, 0]
        heads = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        subset = query[:, heads], key[:, kv_heads], value[:, kv_heads]
        scores, edited = self.scores[:, heads], self.edited[:, heads]

        def attend_without() -> attention.Remainder:
            return attention.attend_without(*subset, self.indices, **_of_heads(options, heads))

        memo_key = ("without", tuple(kv_heads.tolist()), tuple(map(tuple, self.indices.tolist())))
        with torch.no_grad():
            rest = computed_once(owner.kernels, memo_key, attend_without)
            try:
                is_changed = attention.rows_changed(rest, scores, edited, query.dtype)
            except InputError as error:
                raise InputError(f"{owner.name}.hook_key_scores: {error}") from error
            changed = rest.output(subset[2], self.indices, edited).to(query.dtype).transpose(1, 2)
            if owner.kernels is None and self._keeps_first_row_only(is_changed, query, key, options):
                bias = options["bias"]
                of_first: KernelOptions = {**options, "bias": None if bias is None else bias[:, :, :1, :1]}
                changed[:, :1] = attend(query[:, :, :1], key[:, :, :1], value[:, :, :1], of_first)
                return changed.contiguous()
            own = computed_once(owner.kernels, "output", lambda: attend(query, key, value, options))
            output: Tensor = own.clone()
            output[:, :, heads] = torch.where(
                is_changed.transpose(1, 2)[..., None], changed, own[:, :, heads]
            )
        return output

    def _keeps_first_row_only(
        self, is_changed: Tensor, query: Tensor, key: Tensor, options: KernelOptions
    ) -> bool:
        """Return whether the edits change all rows of all heads but that of query 0, which sees key 0 alone."""
        is_causal = options["mask"] is None and query.shape[2] == key.shape[2]
        has_all_heads = is_changed.shape[1] == query.shape[1]
        return (
            is_causal
            and has_all_heads
            and bool((self.indices == 0).all())
            and bool(is_changed[:, :, 1:].all())
        )


def _of_heads(options: KernelOptions, heads: Tensor) -> KernelOptions:
    mask, sink_logits, bias = options["mask"], options["sink_logits"], options["bias"]
    return {
        **options,
        "bias": bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
        "mask": mask if mask is None or mask.shape[1] == 1 else mask[:, heads],
        "sink_logits": None if sink_logits is None else sink_logits[heads],
    }


def computed_once(memo: dict[Hashable, Any] | None, key: Hashable, compute: Callable[[], Any]) -> Any:
    """Return the value under `key`, computed on first use; without a memo, compute it."""
    if memo is None:
        return compute()
    if key not in memo:
        memo[key] = compute()
    return memo[key]


def fire_key_scores(
    owner: AttentionOwner,
    slots: KeySlots,
    query: Tensor,
    key: Tensor,
    options: KernelOptions,
    needs_gradient: bool,
) -> KeyEdit | None:
    """Fire `hook_key_scores` if it is hooked; return the edit, None if no score changed (and none needs a gradient).

    Only the scores of queries after the key can be edited: other queries keep theirs, and hidden keys stay hidden.

    Raises:
        InputError: for an edit that writes +inf, and for hooks of one layer that do not say which keys they edit.
    """
    point = owner.hook_key_scores
    if not is_hooked(point):
        return None
    positions = _named_positions(owner).to(key.device)
    indices = slots.key_indices(positions)
    kernel_options: dict[str, Any] = {**options}
    scores = attention.key_scores(query, key, indices, **kernel_options)
    version = version_of(scores)
    outer = point.ctx.get(_POSITIONS)  # a hook may run another forward
    point.ctx[_POSITIONS] = positions
    try:
        returned = point(scores if version is not None else scores.clone())
    finally:
        point.ctx[_POSITIONS] = outer
    if returned is scores and version_of(scores) == version and not needs_gradient:
        return None
    if returned.shape != scores.shape:
        raise InputError(
            f"{owner.name}.hook_key_scores: a hook returned {list(returned.shape)}; return scores of the shape that it "
            f"received, {list(scores.shape)}"
        )
    if version is not None and version_of(scores) != version:
        scores = attention.key_scores(query, key, indices, **kernel_options)
    query_index = torch.arange(query.shape[2], device=key.device) + key.shape[2] - query.shape[2]
    is_after = query_index[:, None] > indices[:, None, None, :]
    edited = torch.where(is_after & (scores != -torch.inf), returned.to(scores.dtype), scores)
    if bool((edited == torch.inf).any()):
        raise InputError(
            f"{owner.name}.hook_key_scores: an edit writes inf; give a finite score, or -inf, which removes the key"
        )
    if bool((edited == scores).all()) and not needs_gradient:
        return None
    return KeyEdit(indices, scores, edited, needs_gradient)


def _named_positions(owner: AttentionOwner) -> Tensor:
    """Return the positions [batch or 1, n] of all keys that the point's hooks name, each once; −1 for no key."""
    requested = torch.tensor([[owner.streaming_options.sink_position]])
    hooks = [handle.user_hook for handle in owner.hook_key_scores.fwd_hooks]
    named = [hook.positions.cpu() for hook in hooks if isinstance(hook, KeyHook)]
    if not named:
        return requested
    n_texts = max(map(len, named))
    joined = torch.cat([positions.expand(n_texts, -1) for positions in named], -1).sort(-1).values
    is_repeat = torch.zeros_like(joined, dtype=torch.bool)
    is_repeat[:, 1:] = joined[:, 1:] == joined[:, :-1]
    columns = torch.where(is_repeat, -1, joined)
    if len(named) < len(hooks) and not torch.equal(columns, requested):
        raise InputError(
            f"{owner.name}.hook_key_scores: one hook of this layer names keys, and another one does not; give both keys"
        )
    return columns
