"""Massive coordinates that other texts have: where they first appear, what is written there, and random controls.

A coordinate is a layer, a class of tokens (position 0, or the others) and a dimension of the residual stream. For the
texts of a fold, coordinates and the values written into them come from the texts of the other folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from phaselens_plugins._causal import content_keys
from phaselens_plugins._massive_moments import BOS, CLASSES, OTHER, Criterion, LayerMoments, MassiveMoments
from phaselens_plugins._recipes import matched

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import Site

MASSIVE, COUNT, NORM, NORM_EVERYWHERE = TARGETS = ("massive", "count", "norm", "norm everywhere")
"""What is edited: massive coordinates; as many random dimensions; random dimensions of the same norm at the same
tokens; random dimensions of the same norm at every token."""
SMALLEST_MATCH = 0.9
"""A control of equal norm whose squared norm is below this share of the treated one's is not run."""

Span: TypeAlias = tuple[int, str]
"""A layer and a class of tokens."""


@dataclass(frozen=True)
class Coordinate:
    """A massive coordinate: `share` of the texts have it; `value` is its mean, `mean` its dimension's elsewhere."""

    layer: int
    tokens: str
    dimension: int
    share: float
    value: float
    mean: float


@dataclass(frozen=True)
class FoldEdit:
    """The dimensions that are edited in one layer in the texts of one fold.

    `bos` at position 0; `pairs` (source, target): the target at other tokens whose source is massive; `rows` at other
    tokens that have a massive coordinate; `everywhere` at all tokens.
    """

    bos: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    everywhere: tuple[int, ...] = ()

    def mask(self, x: Tensor, criterion: Criterion) -> Tensor:
        """Return bool [pos, d_model], True for what is edited in x [pos, d_model]."""
        import torch

        edited = torch.zeros_like(x, dtype=torch.bool)
        if self.pairs or self.rows:
            massive = criterion.mask(x)
            massive[:1] = False
            for source, target in self.pairs:
                edited[:, target] |= massive[:, source]
            if self.rows:
                edited[:, list(self.rows)] |= massive.any(-1, keepdim=True)
        edited[:, list(self.everywhere)] = True
        edited[:1, list(self.bos)] = True
        return edited


@dataclass(frozen=True, eq=False)
class OverwriteCoordinates:
    """Edit function that writes 0, or each dimension's value, into the coordinates of each text's fold.

    `edits` and `values` [fold, d_model] have one more entry, the last, for texts that are in no fold.
    """

    edits: Sequence[FoldEdit]
    fold_of: Mapping[str, int]
    criterion: Criterion
    values: np.ndarray | None = None

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Overwrite the coordinates in a copy of tensor [batch, pos, d_model]."""
        import torch

        if site.batch is None:
            raise LookupError(
                f"{site.point}: massive coordinates are those of a whole text; run this condition on texts"
            )
        edited = tensor.clone()
        no_fold = len(self.edits) - 1
        for row, (content, length) in enumerate(
            zip(content_keys(site.batch), site.batch.lengths, strict=True)
        ):
            fold = self.fold_of.get(content, no_fold)
            x = tensor[row, :length]
            mask = self.edits[fold].mask(x, self.criterion)
            if self.values is None:
                edited[row, :length] = x.masked_fill(mask, 0.0)
            else:
                values = torch.from_numpy(self.values[fold]).to(x.device, x.dtype)
                edited[row, :length] = torch.where(mask, values, x)
        return edited


@dataclass(frozen=True)
class MassivePlan:
    """The massive coordinates of each fold of texts, and the dimensions that controls edit instead.

    `fold_of` is the fold of each text. A further fold, the last, is that of texts in no fold: its coordinates are those
    of all texts.
    """

    moments: MassiveMoments
    fold_of: Mapping[str, int]
    n_folds: int
    min_share: float
    seed: int

    @classmethod
    def split(cls, moments: MassiveMoments, n_folds: int, min_share: float, seed: int) -> MassivePlan | None:
        """Split the texts by content into folds, at most one per text; None with fewer than two."""
        usable = moments.usable
        n_folds = min(n_folds, len(usable))
        if n_folds < 2:
            return None
        fold_of = {content: rank % n_folds for rank, content in enumerate(usable)}
        # Nothing is selected on an unusable text, but it is run.
        unusable = {content: 0 for content in sorted(moments.by_text) if content not in fold_of}
        return cls(moments, fold_of | unusable, n_folds, min_share, seed)

    def selection(self, fold: int) -> list[str]:
        """Return the texts on which the coordinates of a fold are selected."""
        return [content for content in self.moments.usable if self.fold_of[content] != fold]

    def members(self, fold: int) -> list[str]:
        """Return the usable texts of a fold."""
        return [content for content in self.moments.usable if self.fold_of[content] == fold]

    @cached_property
    def coordinates(self) -> list[list[Coordinate]]:
        """The massive coordinates by fold, each in the first layer where it is massive in enough texts."""
        return [self._select(self.selection(fold)) for fold in range(self.n_folds + 1)]

    def _select(self, contents: Sequence[str]) -> list[Coordinate]:
        import numpy as np

        coordinates: dict[tuple[str, int], Coordinate] = {}
        for layer in sorted(self.moments.by_text[contents[0]]):
            texts = [self.moments.by_text[content][layer] for content in contents]
            n_plain = sum(text.n_plain for text in texts)
            mean = np.sum([text.plain_sums for text in texts], 0) / n_plain if n_plain else None
            for tokens in CLASSES:
                counts = np.stack([text.counts[tokens] for text in texts])
                share = (counts > 0).mean(0)
                values = np.sum([text.sums[tokens] for text in texts], 0)
                for dimension in np.flatnonzero((share > 0) & (share >= self.min_share)).tolist():
                    value = values[dimension] / counts[:, dimension].sum()
                    plain = 0.0 if mean is None else float(mean[dimension])
                    coordinate = Coordinate(layer, tokens, dimension, share[dimension], value, plain)
                    coordinates.setdefault((tokens, dimension), coordinate)
        return list(coordinates.values())

    @property
    def layers(self) -> list[int]:
        """The layers that are edited in some fold."""
        return sorted({coordinate.layer for fold in self.coordinates for coordinate in fold})

    def dimensions(self, fold: int, span: Span) -> list[int]:
        """Return the massive dimensions of a fold in a layer and class of tokens."""
        return [
            coordinate.dimension
            for coordinate in self.coordinates[fold]
            if (coordinate.layer, coordinate.tokens) == span
        ]

    def means(self, layer: int) -> np.ndarray:
        """Return the mean [fold, d_model] over tokens without a massive coordinate, of the texts outside of each fold.

        0 where no text has such a token.
        """
        import numpy as np

        means = []
        for fold in range(self.n_folds + 1):
            texts = [self.moments.by_text[content][layer] for content in self.selection(fold)]
            n_plain = sum(text.n_plain for text in texts)
            means.append(np.sum([text.plain_sums for text in texts], 0) / max(1, n_plain))
        return np.stack(means)

    def edits(self, layer: int, what: str, repeat: int = 0) -> list[FoldEdit]:
        """Return the edit of each fold in a layer; `repeat` numbers the draws of a control."""
        return [self._edit(fold, layer, what, repeat) for fold in range(self.n_folds + 1)]

    def _edit(self, fold: int, layer: int, what: str, repeat: int) -> FoldEdit:
        import numpy as np

        bos, elsewhere = (self.dimensions(fold, (layer, tokens)) for tokens in CLASSES)
        if what == MASSIVE:
            return FoldEdit(tuple(bos), tuple((dimension, dimension) for dimension in elsewhere))
        # The draw does not depend on which other layers or folds are edited.
        generator = np.random.default_rng([self.seed, repeat, fold, layer, TARGETS.index(what)])
        if what == COUNT:
            order = [
                number
                for number in generator.permutation(self._d_model).tolist()
                if number not in self._massive
            ]
            targets = order[len(bos) : len(bos) + len(elsewhere)]
            return FoldEdit(tuple(order[: len(bos)]), tuple(zip(elsewhere, targets, strict=False)))
        if what == NORM:
            drawn = [self._match(fold, layer, tokens, generator) for tokens in CLASSES]
            return FoldEdit(bos=tuple(drawn[0]), rows=tuple(drawn[1]))
        return FoldEdit(everywhere=tuple(self._match(fold, layer, None, generator)))

    @property
    def _d_model(self) -> int:
        first = next(iter(self.moments.by_text.values()))
        return len(next(iter(first.values())).all_squares)

    @cached_property
    def _massive(self) -> set[int]:
        """The dimensions that are massive in any fold, layer and class; no control edits them."""
        return {coordinate.dimension for fold in self.coordinates for coordinate in fold}

    def _match(self, fold: int, layer: int, tokens: str | None, generator: np.random.Generator) -> list[int]:
        """Return random dimensions whose Σ x² is that of the massive coordinates; `tokens` None: at all tokens."""
        import numpy as np

        treated = np.zeros(self._d_model, bool)
        treated[sorted(self._massive)] = True
        contents = self.selection(fold)
        target = self.treated_square(contents, fold, layer, tokens)
        sizes = self._squares(contents, layer, tokens)
        if not target:
            return []
        # `matched` reads its target from the treated entries, and selects none of them.
        sizes[treated] = 0.0
        sizes[np.flatnonzero(treated)[0]] = target
        chosen = matched(sizes, treated, generator.random(self._d_model))
        dimensions: list[int] = np.flatnonzero(chosen).tolist()
        return dimensions

    def treated_square(
        self, contents: Sequence[str], fold: int, layer: int, tokens: str | None = None
    ) -> float:
        """Return Σ x² of the fold's massive coordinates in a layer, over these texts."""
        import numpy as np

        total = 0.0
        for name in CLASSES if tokens is None else (tokens,):
            dimensions = self.dimensions(fold, (layer, name))
            squares = [
                self._of(content, layer).squares[BOS]
                if name == BOS
                else self._of(content, layer).massive_squares[name]
                for content in contents
            ]
            total += float(np.sum([array[dimensions].sum() for array in squares]))
        return total

    def edited_square(
        self, contents: Sequence[str], layer: int, edit: FoldEdit, tokens: str | None = None
    ) -> float:
        """Return Σ x² of what the edit overwrites in a layer at a class of tokens (None: all), over these texts.

        The targets of `pairs` count at all tokens that have a massive coordinate.
        """
        by_class = {
            BOS: list(edit.bos),
            OTHER: [*(target for _, target in edit.pairs), *edit.rows],
        }
        total = 0.0
        for name in CLASSES if tokens is None else (tokens,):
            total += float(self._squares(contents, layer, name)[by_class[name]].sum())
        if tokens is None:
            total += float(self._squares(contents, layer, None)[list(edit.everywhere)].sum())
        return total

    def _squares(self, contents: Sequence[str], layer: int, tokens: str | None) -> np.ndarray:
        import numpy as np

        moments = [self._of(content, layer) for content in contents]
        arrays = [text.all_squares if tokens is None else text.squares[tokens] for text in moments]
        total: np.ndarray = np.sum(arrays, 0) if arrays else np.zeros(self._d_model)
        return total

    def _of(self, content: str, layer: int) -> LayerMoments:
        return self.moments.by_text[content][layer]

    def reason_to_skip(self, what: str, n_repeats: int) -> str:
        """Return why a control cannot be run; empty if it can."""
        n_random = self._d_model - len(self._massive)
        if what == COUNT:
            n_needed = max(
                sum(len(self.dimensions(fold, (layer, tokens))) for tokens in CLASSES)
                for layer in self.layers
                for fold in range(self.n_folds + 1)
            )
            reason = f"{n_needed} dimensions are massive, and only {n_random} are not"
            return reason if n_random < n_needed else ""
        matches = [self.worst_match(what, repeat) for repeat in range(n_repeats)]
        share, layer = min(matches, default=(1.0, -1))
        tokens = "all tokens" if what == NORM_EVERYWHERE else "the same tokens"
        return (
            ""
            if share >= SMALLEST_MATCH
            else f"in layer {layer}, all other dimensions of {tokens} have {share:.2g} times the squared norm of the "
            "massive coordinates"
        )

    def worst_match(self, what: str, repeat: int) -> tuple[float, int]:
        """Return the smallest share of the treated Σ x² that a control reaches, on the texts it is selected on, and the
        layer."""
        shares = [(1.0, -1)]
        for layer in self.layers:
            for fold in range(self.n_folds + 1):
                contents = self.selection(fold)
                for tokens in (None,) if what == NORM_EVERYWHERE else CLASSES:
                    target = self.treated_square(contents, fold, layer, tokens)
                    if target:
                        edit = self._edit(fold, layer, what, repeat)
                        square = self.edited_square(contents, layer, edit, tokens)
                        shares.append((square / target, layer))
        return min(shares)
