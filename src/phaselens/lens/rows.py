"""The absolute positions of a running forward's tokens, and of the keys in its cache.

A *slot* is a column of the token tensor, counted from the first token that the cache saw; pads take slots too. A
*position* counts a text's own tokens: 0 is its first. The two differ where a prompt is padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from phaselens.errors import InputError


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of the model's body that determine the positions of its rows."""

    n_past: int
    n_new: int
    mask: Tensor | None
    position_ids: Tensor | None
    device: torch.device
    #: [batch, pos], the ids of the new tokens; None for a call with embeddings instead.
    tokens: Tensor | None
    #: Whether there is a mask that does not mark pads: one by query and key, or one for each type of layer.
    masks_pairs: bool

    @property
    def n_slots(self) -> int:
        """The number of slots so far: those in the cache, and the new ones."""
        return self.n_past + self.n_new

    @cached_property
    def slot_positions(self) -> Tensor:
        """[batch or 1, slot]: the absolute position of every slot so far, −1 for pads; the same for all layers."""
        if self.mask is not None:
            visible = self.mask.bool()[:, : self.n_slots]
            # Slots for which the mask has no column are hidden, as in transformers.
            visible = nn.functional.pad(visible, (0, self.n_slots - visible.shape[1]))
            return torch.where(visible, visible.long().cumsum(-1) - 1, -1)
        slots = torch.arange(self.n_slots, device=self.device)[None]
        if self.position_ids is None:
            return slots
        ids = self.position_ids
        if self.masks_pairs:
            # Pads are on the left, and their ids mean nothing: positions are counted back from the last one.
            positions = slots - slots[:, -1:] + ids[:, -1:]
            past, ids = positions[:, : self.n_past], torch.where(positions[:, self.n_past :] < 0, -1, ids)
        else:
            # Only the number of cached slots is known: they are assumed to precede the first new one.
            past = slots[:, : self.n_past] - self.n_past + ids[:, :1]
        return torch.cat([torch.where(past >= 0, past, -1), ids], -1)


class Rows:
    """The positions of the running forward's rows, from the arguments of the calls of the model's body.

    It does not refer to the model: a reference from a hook back to its model would keep both alive.
    """

    def __init__(self) -> None:
        #: The running calls, the innermost last, since a hook may run another forward. None: without tokens.
        self._calls: list[_Call | None] = []
        #: [batch], the numbers of real tokens of right-padded texts without an attention mask.
        self.lengths: Tensor | None = None
        #: [batch or 1, position], the keys' segments for `hook_segments`, −1 for none; None: all are in segment 0.
        self.segments: Tensor | None = None
        self.n_segments = 1

    def follow(self, body: nn.Module) -> None:
        """Register for the calls of `body`, the model without its unembedding."""
        body.register_forward_pre_hook(self._begin, with_kwargs=True)
        body.register_forward_hook(self._end, always_call=True)

    @property
    def _call(self) -> _Call | None:
        return self._calls[-1] if self._calls else None

    def _begin(self, _body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None and args:
            tokens = args[0]
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            self._calls.append(None)
            return
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        by_token = isinstance(mask, Tensor) and mask.dim() == 2
        call = _Call(
            n_past=0 if cache is None else int(cache.get_seq_length()),
            n_new=tokens.shape[1],
            mask=mask if by_token else None,
            position_ids=_as_matrix(position_ids),
            device=tokens.device,
            tokens=None if tokens.is_floating_point() else tokens,
            masks_pairs=mask is not None and not by_token,
        )
        self._calls.append(call)

    def _end(self, *_: object) -> None:
        self._calls.pop()

    @contextmanager
    def with_lengths(self, lengths: Tensor | None) -> Iterator[None]:
        """Set the texts' lengths inside the context.

        On exit, calls that were interrupted inside are forgotten: PyTorch runs no hook after a KeyboardInterrupt, so
        they would still seem to be running.
        """
        outer, n_calls = self.lengths, len(self._calls)
        self.lengths = lengths
        try:
            yield
        finally:
            self.lengths = outer
            del self._calls[n_calls:]

    @property
    def lengths_of_next(self) -> Tensor | None:
        """`lengths` for a forward that begins now; None for one within a hook, which has another batch."""
        return None if self.running else self.lengths

    @property
    def running(self) -> bool:
        """Whether a forward of the model's body is running."""
        return self._call is not None

    def _require_call(self) -> _Call:
        if self._call is None:
            raise InputError(
                "positions were requested outside of the model's own forward, or it was called without tokens; run "
                "the whole model"
            )
        return self._call

    @property
    def n_slots(self) -> int:
        """The number of slots so far: those in the cache, and the new ones."""
        return self._require_call().n_slots

    @property
    def n_past(self) -> int:
        """The number of slots in the cache before this call."""
        return self._require_call().n_past

    def positions(self) -> Tensor:
        """Return the absolute positions [batch or 1, pos] of this call's rows; −1 for left pads and masked rows."""
        call = self._require_call()
        return call.slot_positions[:, call.n_past :]

    def key_positions(self) -> Tensor:
        """Return the absolute positions [batch or 1, slot] of every slot so far; −1 for pads."""
        return self._require_call().slot_positions

    @property
    def tokens(self) -> Tensor | None:
        """The ids [batch, pos] of this call's tokens; None for a call with embeddings instead of tokens."""
        return None if self._call is None else self._call.tokens

    def starts(self) -> list[int]:
        """Return the absolute position of each text's first row in this call, negative if that is a pad: counted back
        from the first real row. One entry if all texts agree."""
        call = self._require_call()
        if call.mask is None and call.position_ids is None:
            return [call.n_past]
        positions = self.positions()
        real = positions >= 0
        first_real = real.int().argmax(-1, keepdim=True)
        counted_back = (positions.gather(-1, first_real) - first_real)[:, 0]
        starts = torch.where(real.any(-1), counted_back, -call.n_new).tolist()
        return starts[:1] if len(set(starts)) == 1 else starts

    def real(self) -> Tensor | None:
        """Return a mask [batch or 1, pos], True where a row of this call is a real token; None if all of them are."""
        call = self._require_call()
        if self.lengths is not None:
            slots = torch.arange(call.n_past, call.n_slots, device=call.device)
            return slots[None, :] < self.lengths.to(call.device)[:, None]
        if call.mask is None and not call.masks_pairs:
            return None
        return self.positions() >= 0

    def text_lengths(self, position_ids: Tensor) -> Tensor:
        """Return the length of each text so far [batch or 1], given the position ids [batch or 1, pos] of this call."""
        real = self.real() if self.running else None
        if real is None:
            return position_ids.amax(-1) + 1
        return torch.where(real, position_ids, -1).amax(-1) + 1

    def slots_at(self, position: int) -> list[int]:
        """Return the slot of an absolute position in each text, −1 for none; one entry if all texts agree."""
        call = self._require_call()
        if call.mask is None and call.position_ids is None:
            return [position]
        hits = call.slot_positions == position
        slots = torch.where(hits.any(-1), hits.int().argmax(-1), -1).tolist()
        return slots[:1] if len(set(slots)) == 1 else slots

    def slots_of(self, positions: Tensor) -> Tensor:
        """Return the slots of absolute positions [batch or 1, n], by text; −1 where a text has no such position."""
        call = self._require_call()
        if call.mask is None and call.position_ids is None:
            return torch.where(positions < call.n_slots, positions, -1)
        hits = call.slot_positions[:, None, :] == positions[:, :, None]
        return torch.where(hits.any(-1) & (positions >= 0), hits.int().argmax(-1), -1)

    def require_contiguous(self, statistic: str) -> None:
        """Raise InputError if the mask hides a token between two visible ones.

        Distances between slots are then not distances between positions.
        """
        call = self._require_call()
        if call.mask is None:
            return
        visible = call.mask.bool()
        n_spans = (visible[:, 1:] & ~visible[:, :-1]).sum(-1) + visible[:, 0]
        if bool((n_spans > 1).any()):
            raise InputError(
                f"{statistic}: the attention mask hides tokens between visible ones, where distances are undefined; "
                "give the text without the hidden tokens"
            )


def _as_matrix(position_ids: object) -> Tensor | None:
    """Return position ids as [batch or 1, pos]; None if there are none, or several per token."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() > 2:
        return None
    return position_ids if position_ids.dim() == 2 else position_ids[None]
