"""Segments of the keys, whose attention `hook_segments` measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from phaselens.errors import InputError, require_whole, type_unless_whole
from phaselens.lens.ownership import owned_context
from phaselens.lens.stream_inputs import LARGEST_SIZE

if TYPE_CHECKING:
    from phaselens.lens.attention_owner import StreamingOptions


class LabelsSegments(TransformerBridge):
    """A bridge whose keys can be divided into segments."""

    _streaming_options: StreamingOptions

    @owned_context
    @contextmanager
    def segmented(self, segments: Tensor | None, n_segments: int | None = None) -> Iterator[None]:
        """Let `hook_segments` measure the attention on these segments of keys in forwards inside the context.

        Args:
            segments: [batch or 1, position], the segment of the key at each absolute position, from 0; −1 for a key in
                none, as all positions beyond these are. None: all keys are in one segment.
            n_segments: the number of segments; by default the largest plus 1.

        >>> import phaselens, torch
        >>> from phaselens.testing import tiny_model
        >>> lens = phaselens.load(tiny_model("llama"))
        >>> masses = []
        >>> hook = lambda mass, hook: masses.append(mass)
        >>> with lens.segmented(torch.tensor([[0, 1, 1, 2]])):
        ...     final = lens.stream(torch.tensor([[0, 5, 7, 9]]), [("blocks.0.attn.hook_segments", hook)])
        >>> tuple(masses[0].shape), round(float(masses[0][0, 0, 3].sum()), 4)
        ((1, 4, 4, 3), 1.0)
        """
        if segments is not None:
            received = type_unless_whole(segments) or (
                "" if segments.dim() == 2 else str(list(segments.shape))
            )
            if received:
                raise InputError(
                    f"expected segments as a tensor [batch or 1, position] of whole numbers, received {received}"
                )
        if n_segments is not None:
            require_whole("n_segments", n_segments, 1)
        largest = -1 if segments is None or not segments.numel() else int(segments.max())
        if segments is not None and segments.numel() and int(segments.min()) < -1:
            raise InputError(f"segments: {int(segments.min())}; number segments from 0, and give −1 for none")
        n_needed = max(1, largest + 1)
        if (n_segments or n_needed) < n_needed or max(n_segments or 0, n_needed) > LARGEST_SIZE:
            raise InputError(
                f"segments up to {largest}, and n_segments {n_segments}; give n_segments above the largest segment, "
                f"and at most {LARGEST_SIZE}"
            )
        rows = self._streaming_options.rows
        outer = rows.segments, rows.n_segments
        rows.segments, rows.n_segments = segments, n_segments or n_needed
        try:
            yield
        finally:
            rows.segments, rows.n_segments = outer
