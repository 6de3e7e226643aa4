"""The tokens that the keys of a layer belong to: a cache may hold fewer keys than the text has, or room for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from phaselens.lens.points import dimensions
from phaselens.lens.rows import Rows


class KernelOptions(TypedDict):
    """The options of one layer's softmax, as the functions of `phaselens.attention` take them."""

    scale: float
    mask: Tensor | None
    softcap: float | None
    sink_logits: Tensor | None
    bias: Tensor | None


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
    def of_call(cls, rows: Rows, key: Tensor) -> KeySlots:
        """Return the slots of `key` [batch, kv_head, key, d_head] in the call that `rows` follows."""
        # An attention module that is called alone gets all keys, and none of them is a pad.
        if not rows.running:
            return cls(None, key.shape[2], 0, len(key))
        n_keys, n_slots = key.shape[2], rows.n_slots
        return cls(rows, min(n_keys, n_slots), max(0, n_slots - n_keys), len(key))

    @property
    def real(self) -> Tensor | None:
        """[batch, query], True where a query is a text's own token; None where all are."""
        real = None if self.rows is None else self.rows.real()
        return None if real is None else real.expand(self.n_texts, -1)

    def slots_at(self, position: int) -> list[int]:
        """Return the slot of an absolute position in each text, −1 for none; one entry if all texts agree."""
        return [position] if self.rows is None else self.rows.slots_at(position)

    def key_indices(self, positions: Tensor) -> Tensor:
        """Return the indices of the keys at absolute positions [batch or 1, n], by text; −1 for a position without a
        key, which the text does not have or the cache has dropped."""
        slots = positions if self.rows is None else self.rows.slots_of(positions)
        indices = slots - self.n_dropped
        return torch.where((slots >= 0) & (indices >= 0) & (indices < self.n_kept), indices, -1)

    def segment_labels(self, device: torch.device) -> Tensor:
        """Return the segments [batch or 1, key] of the keys, −1 for a key in none, by those of their positions.

        Positions beyond those that have a segment are in none. Without segments all keys are in segment 0.
        """
        if self.rows is None or self.rows.segments is None:
            return torch.zeros(1, self.n_kept, dtype=torch.long, device=device)
        positions = self.rows.key_positions()[:, self.n_dropped :][:, : self.n_kept].to(device)
        segments = self.rows.segments.to(device)
        n_texts = max(len(positions), len(segments))
        positions, segments = positions.expand(n_texts, -1), segments.expand(n_texts, -1)
        is_labelled = (positions >= 0) & (positions < segments.shape[1])
        labels = segments.gather(1, torch.where(is_labelled, positions, 0))
        return torch.where(is_labelled, labels, -1)

    def positions_of(self, indices: Tensor) -> Tensor:
        """Return the absolute positions of keys, given their indices [batch, head, query] as floats; NaN stays NaN."""
        if self.rows is None:
            return indices
        positions = self.rows.key_positions()[:, self.n_dropped :][:, : self.n_kept].to(indices.device)
        is_key = ~indices.isnan()
        by_head = positions[:, None].expand(*indices.shape[:2], -1)
        chosen = by_head.gather(2, torch.where(is_key, indices, 0.0).long())
        return torch.where(is_key, chosen.to(indices.dtype), torch.nan)

    @property
    def n_segments(self) -> int:
        """The number of segments of the keys."""
        return 1 if self.rows is None else self.rows.n_segments

    def require_served(self, statistics: Sequence[str]) -> None:
        """Raise InputError for statistics that are undefined under the mask of this call."""
        for statistic in statistics:
            if self.rows is not None and "distance" in dimensions(f"attn.{statistic}"):
                self.rows.require_contiguous(statistic)

    def crop(self, keys: Tensor) -> Tensor:
        """Return keys or values [batch, kv_head, key, d] without the slots that are not filled yet."""
        return keys[:, :, : self.n_kept]

    def crop_mask(self, options: KernelOptions) -> KernelOptions:
        """Return the softmax options with a mask and a bias for the filled slots only."""
        mask, bias = options["mask"], options["bias"]
        if mask is not None and mask.shape[-1] != self.n_kept:
            mask = mask[..., : self.n_kept]
        if bias is not None and bias.shape[-1] != self.n_kept:
            bias = bias[..., : self.n_kept]
        return {**options, "mask": mask, "bias": bias}

    def with_dropped(self, by_key: Tensor, value: float) -> Tensor:
        """Return a tensor [..., key] with a column for each slot so far, `value` in those whose keys were dropped."""
        if not self.n_dropped:
            return by_key
        return torch.nn.functional.pad(by_key, (self.n_dropped, 0), value=value)
