"""Cells (head × dimension) of queries and keys: chosen on some texts, overwritten in others.

A cell that is chosen on the text it is then tried on, or on a pass that was already disturbed, is not the cell that an
undisturbed model uses in general. So texts are dealt into folds by what they say; for the texts of a fold, cells and
the values written into them come from the clean passes of the other folds' texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import Batch, LayerView, Site


#: Where: layer and tensor, `q` or `k`.
Place = tuple[int, str]


def contents(batch: Batch) -> Sequence[str]:
    """What tells texts apart: a hash of what each says."""
    return batch.hashes or batch.texts


@dataclass
class Moments:
    """Of every text, Σ x² and Σ x over its tokens, [head, d_head] by layer and tensor; float64.

    Texts that say the same count once. It can be pickled and merged in any order.
    """

    squares: dict[str, dict[Place, np.ndarray]] = field(default_factory=dict)
    sums: dict[str, dict[Place, np.ndarray]] = field(default_factory=dict)
    n_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, layer: LayerView, points: Mapping[str, str]) -> None:
        """Take in the states [batch, pos, head, d_head] at `points`, by tensor, without their pads."""
        batch = layer.batch
        self.n_tokens.update(zip(contents(batch), batch.lengths, strict=True))
        for tensor, point in points.items():
            place, states = (layer.index or 0, tensor), layer.float64(point)
            for row, (content, length) in enumerate(zip(contents(batch), batch.lengths, strict=True)):
                own = states[row, :length]
                self.squares.setdefault(content, {})[place] = own.square().sum(0).cpu().numpy()
                self.sums.setdefault(content, {})[place] = own.sum(0).cpu().numpy()

    def merge(self, other: Moments) -> None:
        """Take over what `other` saw."""
        for mine, theirs in ((self.squares, other.squares), (self.sums, other.sums)):
            for content, found in theirs.items():
                mine.setdefault(content, {}).update(found)
        self.n_tokens.update(other.n_tokens)

    @property
    def places(self) -> list[Place]:
        """Layers and tensors, in order."""
        return sorted({place for found in self.squares.values() for place in found})

    @property
    def usable(self) -> list[str]:
        """Texts whose states are finite, ordered by what they say."""
        import numpy as np

        return sorted(
            content
            for content, found in self.squares.items()
            if all(bool(np.isfinite(each).all()) for each in found.values())
        )

    def squared(self, texts: Iterable[str], place: Place) -> np.ndarray:
        """M² [head, d_head]: Σ x² over all tokens of these texts."""
        import numpy as np

        total: np.ndarray = np.sum([self.squares[text][place] for text in texts], axis=0)
        return total

    def mean(self, texts: Sequence[str], place: Place) -> np.ndarray:
        """Mean [head, d_head] over all tokens of these texts."""
        import numpy as np

        total: np.ndarray = np.sum([self.sums[text][place] for text in texts], axis=0)
        return total / sum(self.n_tokens[text] for text in texts)


@dataclass(frozen=True)
class Folds:
    """Texts dealt into folds. `of` says which one a text is in; `others[fold]` are the usable texts outside of it.

    There is one more entry in `others` than there are folds: all usable texts, for texts that are in no fold.
    """

    of: Mapping[str, int]
    others: Sequence[Sequence[str]]

    @classmethod
    def deal(cls, moments: Moments, n: int) -> Folds | None:
        """`n` folds, or as many as there are texts; None where a text would have no other to choose on."""
        usable = moments.usable
        n = min(n, len(usable))
        if n < 2:
            return None
        of = {text: place % n for place, text in enumerate(usable)}
        # A text that is not usable chooses nothing, but it is run, and must not meet cells of its own making either.
        broken = {text: 0 for text in sorted(moments.squares) if text not in of}
        others = [[text for text in usable if of[text] != fold] for fold in range(n)]
        return cls(of | broken, [*others, usable])

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.others) - 1

    def members(self, fold: int) -> list[str]:
        """The usable texts in a fold."""
        return [text for text in self.others[-1] if self.of[text] == fold]


@dataclass(frozen=True, eq=False)
class Overwrite:
    """What an edit does: it puts zero, or `values`, into the cells that belong to a text's fold.

    cells: bool [fold, head, d_head]; values: float64, the same shape, or None for zero. Both are constants, so the same
    happens to a token wherever it stands, and whether it comes in a prompt or one at a time.
    """

    cells: np.ndarray
    folds: Mapping[str, int]
    values: np.ndarray | None = None

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """[batch, pos, head, d_head], overwritten."""
        import torch

        last = len(self.cells) - 1
        rows = [last] if site.batch is None else [self.folds.get(text, last) for text in contents(site.batch)]
        cells = torch.from_numpy(self.cells[rows])[:, None].to(tensor.device)
        if self.values is None:
            return tensor.masked_fill(cells, 0.0)
        values = torch.from_numpy(self.values[rows])[:, None].to(tensor.dtype).to(tensor.device)
        return torch.where(cells, values, tensor)
