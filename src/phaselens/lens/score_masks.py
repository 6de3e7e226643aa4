"""What hides keys and biases scores in an attention module that computes its own softmax, read off its lazy scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from phaselens.errors import RefusedModel
from phaselens.lens.lazy_masks import LazyMask
from phaselens.lens.lazy_scores import ScoreTerms
from phaselens.lens.masks import note_rule


@dataclass(frozen=True)
class Band:
    """A mask that a module made itself: a query sees its own key and the `window` − 1 keys before it, or all (None)."""

    window: int | None

    def visible(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """Return the mask [query, key], True where visible; the last query is at the last key."""
        position = torch.arange(n_keys, device=device)
        return self.sees(position[n_keys - n_queries :, None], position)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether queries see keys, elementwise, of positions that broadcast against each other."""
        is_causal = key <= query
        return is_causal if self.window is None else is_causal & (key > query - self.window)

    def hides_nothing_of(self, n_keys: int) -> bool:
        """Return whether the band is the causal mask in a text of `n_keys`."""
        return self.window is None or self.window >= n_keys


class MaskReader:
    """Reads the mask and the bias of one module's scores."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._band_by_buffer: dict[int, Band | None] = {}
        self._first_band: Band | None = None

    def read(self, module: nn.Module, terms: ScoreTerms) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask (None: causal) and the bias [batch | 1, head | 1, 1, key] of a call, as `attend` takes them.

        Raises:
            RefusedModel: for a module that hides no key, and so attends in both directions.
        """
        n_queries, n_keys = terms.query.shape[2], terms.key.shape[2]
        biases = [added for added in terms.added if added.shape[2] == 1]
        matrices = [added for added in terms.added if added.shape[2] > 1]
        hidden_in_matrices = [_hides(matrix) for matrix in matrices]
        masks = [*terms.masks, *(~hidden for hidden in hidden_in_matrices if bool(hidden.any()))]
        if not masks and n_queries > 1:
            raise RefusedModel(
                f"{self.label} attends in both directions; PhaseLens serves causal attention only"
            )
        built, bands = [], []
        for mask in masks:
            if isinstance(mask, LazyMask):
                if mask.visible is not None:
                    built.append(mask.visible)
                elif n_queries > 1:
                    bands.append(Band(None))
                continue
            band = self._band(mask)
            if band is None:
                built.append(mask)
            else:
                bands.append(band)
        note_rule(module, built, [band.sees for band in bands])
        narrow = [band for band in bands if not band.hides_nothing_of(n_keys)]
        bias = reduce(torch.add, biases) if biases else None
        if not built and not narrow and not matrices:
            return None, bias
        visible = [
            band.visible(n_queries, n_keys, terms.query.device)[None, None] for band in narrow or bands[:1]
        ]
        shown = reduce(torch.logical_and, [*built, *visible]) if built or visible else None
        if not matrices:
            return shown, bias
        matrix = reduce(
            torch.add,
            (
                matrix.masked_fill(hidden, 0.0)
                for matrix, hidden in zip(matrices, hidden_in_matrices, strict=True)
            ),
        )
        return matrix if shown is None else matrix.masked_fill(~shown, -torch.inf), bias

    def _band(self, visible: Tensor) -> Band | None:
        """Return the band that a mask made by the module is; None if it is none, or if its rows are those of texts.

        Where the mask is part of a buffer for the longest text, the buffer is measured.
        """
        n_queries, n_keys = visible.shape[-2:]
        base = visible._base
        if base is not None and base.dim() >= 2 and base.numel() == base.shape[-1] ** 2 > 1:
            n_positions = base.shape[-1]
            is_aligned = visible.storage_offset() == (n_keys - n_queries) * n_positions
            if is_aligned and visible.stride()[-2:] == (n_positions, 1):
                pointer = base.data_ptr()
                if pointer not in self._band_by_buffer:
                    self._band_by_buffer[pointer] = _measured(base.reshape(1, n_positions, n_positions))
                return self._band_by_buffer[pointer]
        band = _measured(visible.reshape(-1, n_queries, n_keys))
        if band is None or band.window == 1:
            return None  # tokens with equal positions, which transformers takes for texts of one token each
        if self._first_band is None:
            self._first_band = band
        if band != self._first_band:
            raise RefusedModel(
                f"{self.label} hides other keys in a text of {n_keys} tokens than in a short one; PhaseLens measures "
                "causal attention and sliding windows that it can determine when a model is loaded"
            )
        return band


def _hides(matrix: Tensor) -> Tensor:
    """Return where an additive matrix hides a key: at −inf, and at numbers near the lowest of its dtype."""
    return matrix <= torch.finfo(matrix.dtype).min / 2


def _measured(visible: Tensor) -> Band | None:
    """Return the band that masks [rows, query, key] are, the last query at the last key; None if they are none."""
    n_queries, n_keys = visible.shape[-2:]
    n_visible = int(visible[0, -1].sum())
    band = Band(n_visible if n_visible < n_keys else None)
    is_band = visible.bool() == band.visible(n_queries, n_keys, visible.device)
    return band if bool(is_band.all()) else None
