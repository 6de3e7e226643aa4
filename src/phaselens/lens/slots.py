"""Which tokens the keys that reach a layer belong to: a cache may hold fewer than the text has, or room for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phaselens.lens.rows import Rows


@dataclass(frozen=True)
class KeySlots:
    """The keys of one layer in one call: the last `n_kept` of the slots so far.

    A sliding-window cache drops the slots before those (`n_dropped`); a static cache has room for slots that are not
    filled yet, which come last.
    """

    rows: Rows | None
    n_kept: int
    n_dropped: int
    n_texts: int

    @classmethod
    def of(cls, rows: Rows, key: Tensor) -> KeySlots:
        """The slots of `key` [batch, kv_head, key, d_head] in the call that `rows` follows."""
        if (
            not rows.running
        ):  # an attention module that is called by itself: its keys are all there is, and no pads
            return cls(None, key.shape[2], 0, len(key))
        n_keys, n_slots = key.shape[2], rows.n_slots
        return cls(rows, min(n_keys, n_slots), max(0, n_slots - n_keys), len(key))

    @property
    def real(self) -> Tensor | None:
        """[batch, query], True where a query is a text's own token; None where all are."""
        real = None if self.rows is None else self.rows.real()
        return None if real is None else real.expand(self.n_texts, -1)

    def at(self, position: int) -> list[int]:
        """The slot of the token at an absolute position for each text, or one entry for all; −1 for none."""
        return [position] if self.rows is None else self.rows.slots_at(position)

    def require_served(self, statistics: Sequence[str]) -> None:
        """InputError for statistics that have no meaning under the mask of this call."""
        if "hook_distance" in statistics and self.rows is not None:
            self.rows.require_contiguous("hook_distance")

    def crop(self, keys: Tensor) -> Tensor:
        """Keys or values [batch, kv_head, key, d] without the slots that are not filled yet."""
        return keys[:, :, : self.n_kept]

    def crop_mask(self, options: dict[str, Any]) -> dict[str, Any]:
        """The softmax options with a mask for the filled slots only."""
        mask = options["mask"]
        if mask is None or mask.shape[-1] == self.n_kept:
            return options
        return {**options, "mask": mask[..., : self.n_kept]}

    def with_dropped(self, by_key: Tensor, value: float) -> Tensor:
        """A tensor [..., key] with a column for each slot so far, `value` in those whose keys are gone."""
        if not self.n_dropped:
            return by_key
        return torch.nn.functional.pad(by_key, (self.n_dropped, 0), value=value)
