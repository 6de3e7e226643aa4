"""Cells (head × dimension) of queries and keys: selected on some texts, overwritten in others.

A cell selected on the text that it is tested on, or in a disturbed pass, is not the cell that an undisturbed model uses
in general. So texts are split into folds by content; for the texts of a fold, cells and the values written into them
come from clean passes over the texts of the other folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from phaselens_plugins._causal import content_keys, merge_nested

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import LayerView, Site


#: A layer and a tensor, `q` or `k`.
LayerPoint: TypeAlias = tuple[int, str]


@dataclass
class CellMoments:
    """Sums over each text's tokens, Σ x² and Σ x, [head, d_head] by text and by layer and tensor; float64.

    Texts of equal content count once. Moments can be merged in any order.
    """

    squares: dict[str, dict[LayerPoint, np.ndarray]] = field(default_factory=dict)
    sums: dict[str, dict[LayerPoint, np.ndarray]] = field(default_factory=dict)
    n_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, layer: LayerView, points: Mapping[str, str]) -> None:
        """Add the states [batch, pos, head, d_head] at `points`, by tensor, without their pads."""
        batch = layer.batch
        self.n_tokens.update(zip(content_keys(batch), batch.lengths, strict=True))
        for tensor, point in points.items():
            layer_point, states = (layer.index or 0, tensor), layer.float64(point)
            for row, (text, length) in enumerate(zip(content_keys(batch), batch.lengths, strict=True)):
                text_states = states[row, :length]
                self.squares.setdefault(text, {})[layer_point] = text_states.square().sum(0).cpu().numpy()
                self.sums.setdefault(text, {})[layer_point] = text_states.sum(0).cpu().numpy()

    def merge(self, other: CellMoments) -> None:
        """Add the moments of `other`."""
        merge_nested(self.squares, other.squares)
        merge_nested(self.sums, other.sums)
        self.n_tokens.update(other.n_tokens)

    @property
    def layer_points(self) -> list[LayerPoint]:
        """Layers and tensors, in order."""
        return sorted({layer_point for squares in self.squares.values() for layer_point in squares})

    @property
    def usable_texts(self) -> list[str]:
        """Texts whose states are finite, ordered by content."""
        import numpy as np

        return sorted(
            text
            for text, squares in self.squares.items()
            if all(bool(np.isfinite(array).all()) for array in squares.values())
        )

    def sum_of_squares(self, text_ids: Iterable[str], layer_point: LayerPoint) -> np.ndarray:
        """Return M² [head, d_head]: Σ x² over all tokens of these texts."""
        import numpy as np

        total: np.ndarray = np.sum([self.squares[text][layer_point] for text in text_ids], axis=0)
        return total

    def mean(self, text_ids: Sequence[str], layer_point: LayerPoint) -> np.ndarray:
        """Return the mean [head, d_head] over all tokens of these texts."""
        import numpy as np

        total: np.ndarray = np.sum([self.sums[text][layer_point] for text in text_ids], axis=0)
        return total / sum(self.n_tokens[text] for text in text_ids)


@dataclass(frozen=True)
class Folds:
    """A split of texts into folds.

    Attributes:
        fold_of: the fold of each text.
        selection_texts: by fold, the usable texts outside of it, on which its cells are selected. One more entry, the
            last, has all usable texts, for texts that are in no fold.
    """

    fold_of: Mapping[str, int]
    selection_texts: Sequence[Sequence[str]]

    @classmethod
    def split(cls, moments: CellMoments, n: int) -> Folds | None:
        """Split into `n` folds, or one per text if there are fewer; None if there are no other texts to select on."""
        usable = moments.usable_texts
        n = min(n, len(usable))
        if n < 2:
            return None
        fold_of = {text: rank % n for rank, text in enumerate(usable)}
        # No cells are selected on an unusable text, but it is run, so it too needs cells selected on other texts.
        unusable = {text: 0 for text in sorted(moments.squares) if text not in fold_of}
        selection_texts = [[text for text in usable if fold_of[text] != fold] for fold in range(n)]
        return cls(fold_of | unusable, [*selection_texts, usable])

    @property
    def n(self) -> int:
        """Number of folds."""
        return len(self.selection_texts) - 1

    def members(self, fold: int) -> list[str]:
        """Return the usable texts of a fold."""
        return [text for text in self.selection_texts[-1] if self.fold_of[text] == fold]


@dataclass(frozen=True, eq=False)
class OverwriteCells:
    """Edit function that writes zero, or `values`, into the cells selected for a text's fold.

    cells: bool [fold, head, d_head]; values: float64 of the same shape, or None for zero. Both are constants, so the
    edit is the same at every position, in a prompt and with a KV cache.
    """

    cells: np.ndarray
    fold_of: Mapping[str, int]
    values: np.ndarray | None = None

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Overwrite the cells in a copy of tensor [batch, pos, head, d_head]."""
        import torch

        no_fold = len(self.cells) - 1
        folds = (
            [no_fold]
            if site.batch is None
            else [self.fold_of.get(text, no_fold) for text in content_keys(site.batch)]
        )
        cells = torch.from_numpy(self.cells[folds])[:, None].to(tensor.device)
        if self.values is None:
            return tensor.masked_fill(cells, 0.0)
        values = torch.from_numpy(self.values[folds])[:, None].to(tensor.dtype).to(tensor.device)
        return torch.where(cells, values, tensor)
