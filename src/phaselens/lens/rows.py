"""Where the rows of a running forward stand: absolute positions of its tokens and of the keys that a cache holds.

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
from torch import Tensor
from transformers import Cache

from phaselens.errors import InputError


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of the model's body, as far as they say where its rows stand."""

    n_past: int
    n_new: int
    mask: Tensor | None
    position_ids: Tensor | None
    device: torch.device
    #: Whether there is a mask that does not say which tokens are pads: by query and key, or one for each kind of layer.
    masks_pairs: bool

    @property
    def n_slots(self) -> int:
        """Slots so far: those that a cache has seen, and the new ones."""
        return self.n_past + self.n_new

    @cached_property
    def slot_positions(self) -> Tensor:
        """[batch or 1, slot]: the absolute position of every slot so far, pads at −1. All layers read the same one."""
        if self.mask is not None:
            seen = self.mask.bool()[:, : self.n_slots]
            # As transformers does it: slots for which the mask has no column are hidden.
            seen = torch.nn.functional.pad(seen, (0, self.n_slots - seen.shape[1]))
            return torch.where(seen, seen.long().cumsum(-1) - 1, -1)
        slots = torch.arange(self.n_slots, device=self.device)[None]
        if self.position_ids is None:
            return slots
        ids = self.position_ids
        if self.masks_pairs:
            # Pads stand on the left, under ids that say nothing: positions are counted back from the last one.
            counted = slots - slots[:, -1:] + ids[:, -1:]
            past, ids = counted[:, : self.n_past], torch.where(counted[:, self.n_past :] < 0, -1, ids)
        else:
            # Of slots in the cache only their number is known: they are taken to lead up to the first new one.
            past = slots[:, : self.n_past] - self.n_past + ids[:, :1]
        return torch.cat([torch.where(past >= 0, past, -1), ids], -1)


class Rows:
    """Follows the calls of the model's body, and so knows where the rows of the forward that is running stand.

    It holds no model: a reference from a hook back to its model would keep both alive.
    """

    def __init__(self) -> None:
        #: The calls that are running, the innermost last: a hook may run a forward of its own. None: not followed.
        self._calls: list[_Call | None] = []
        #: [batch], the real tokens of right-padded texts that come without an attention mask.
        self.lengths: Tensor | None = None

    def follow(self, body: Any) -> None:
        """Listen to the calls of `body`, the model without its unembedding."""
        body.register_forward_pre_hook(self._begin, with_kwargs=True)
        body.register_forward_hook(self._end, always_call=True)

    @property
    def _call(self) -> _Call | None:
        return self._calls[-1] if self._calls else None

    def _begin(self, _body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            masks_pairs=mask is not None and not by_token,
        )
        self._calls.append(call)

    def _end(self, *_: Any) -> None:
        self._calls.pop()

    @contextmanager
    def reading(self, lengths: Tensor | None) -> Iterator[None]:
        """Inside, texts have these `lengths`. Outside, nothing is left of calls that were interrupted inside: PyTorch
        runs no hook after a KeyboardInterrupt, so that they would seem to go on."""
        before, n_calls = self.lengths, len(self._calls)
        self.lengths = lengths
        try:
            yield
        finally:
            self.lengths = before
            del self._calls[n_calls:]

    @property
    def lengths_of_next(self) -> Tensor | None:
        """`lengths`, as far as they are those of a forward that begins now: one within a hook is of another batch."""
        return None if self.running else self.lengths

    @property
    def running(self) -> bool:
        """Whether a forward of the model's body is under way."""
        return self._call is not None

    def _require_call(self) -> _Call:
        if self._call is None:
            raise InputError(
                "positions were asked for outside of the model's own forward, or it was called without tokens; run "
                "the whole model"
            )
        return self._call

    @property
    def n_slots(self) -> int:
        """Slots so far: those that a cache has seen, and the new ones."""
        return self._require_call().n_slots

    @property
    def n_past(self) -> int:
        """Slots that a cache saw before this call."""
        return self._require_call().n_past

    def positions(self) -> Tensor:
        """Absolute positions [batch or 1, pos] of the rows of this call; pads on the left, and masked ones, at −1."""
        call = self._require_call()
        return call.slot_positions[:, call.n_past :]

    def starts(self) -> list[int]:
        """The absolute position of each text's first row in this call, counted on to the left where that is a pad. One
        entry stands for all texts where they agree."""
        call = self._require_call()
        if call.mask is None and call.position_ids is None:
            return [call.n_past]
        positions = self.positions()
        real = positions >= 0
        first = real.int().argmax(-1, keepdim=True)
        starts = torch.where(real.any(-1), (positions.gather(-1, first) - first)[:, 0], -call.n_new).tolist()
        return starts[:1] if len(set(starts)) == 1 else starts

    def real(self) -> Tensor | None:
        """[batch or 1, pos], True where a row of this call is a text's own token; None where all of them are."""
        call = self._require_call()
        if self.lengths is not None:
            slots = torch.arange(call.n_past, call.n_slots, device=call.device)
            return slots[None, :] < self.lengths.to(call.device)[:, None]
        if call.mask is None and not call.masks_pairs:
            return None
        return self.positions() >= 0

    def text_lengths(self, position_ids: Tensor) -> Tensor:
        """How long each text is so far [batch or 1], given the position ids [batch or 1, pos] of this call."""
        real = self.real() if self.running else None
        if real is None:
            return position_ids.amax(-1) + 1
        return torch.where(real, position_ids, -1).amax(-1) + 1

    def slots_at(self, position: int) -> list[int]:
        """The slot of the token at an absolute position, for each text; −1 where there is none. One entry stands for
        all texts where they agree."""
        call = self._require_call()
        if call.mask is None and call.position_ids is None:
            return [position]
        hits = call.slot_positions == position
        slots = torch.where(hits.any(-1), hits.int().argmax(-1), -1).tolist()
        return slots[:1] if len(set(slots)) == 1 else slots

    def require_contiguous(self, what: str) -> None:
        """InputError where a mask hides a token between two visible ones: distances in slots are then not distances
        between positions."""
        call = self._require_call()
        if call.mask is None:
            return
        seen = call.mask.bool()
        starts = (seen[:, 1:] & ~seen[:, :-1]).sum(-1) + seen[:, 0]
        if bool((starts > 1).any()):
            raise InputError(
                f"{what}: the attention mask hides tokens between visible ones, where distances are undefined; "
                "give the text without the hidden tokens"
            )


def _as_matrix(position_ids: Any) -> Tensor | None:
    """Position ids as [batch or 1, pos]; None where there are none, or several to a token."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() > 2:
        return None
    return position_ids if position_ids.dim() == 2 else position_ids[None]
