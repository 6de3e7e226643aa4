"""Sampled rows of the residual stream, and how well a linear probe reads their positions in texts it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phaselens_plugins._common import generator_for
from phaselens_plugins._ridge import FEWEST_FOLDS, CrossValidation, cross_validate

if TYPE_CHECKING:
    import numpy as np

TARGETS = ("t / T", "ln(1 + t)")


@dataclass
class SampledText:
    """Sampled positions of a text, from 1 on, and their rows by layer: [position, d_model], of the model's dtype."""

    content: str
    n_tokens: int
    positions: np.ndarray
    rows: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def draw(cls, content: str, n_tokens: int, n_rows: int, seed: int) -> SampledText:
        """Draw up to `n_rows` positions other than 0, in order."""
        import numpy as np

        n_drawn = min(n_rows, max(0, n_tokens - 1))
        drawn = generator_for(content, seed, "positions").permutation(max(0, n_tokens - 1))[:n_drawn]
        return cls(content, n_tokens, 1 + np.sort(drawn))

    def targets(self, n_permutations: int, seed: int) -> np.ndarray:
        """Return [row, target, 1 + permutation]: t / T and ln(1 + t), then both with the positions permuted."""
        import numpy as np

        values = np.stack([self.positions / self.n_tokens, np.log1p(self.positions)], 1)
        generator = generator_for(self.content, seed, "permutations")
        orders = [generator.permutation(len(values)) for _ in range(n_permutations)]
        return np.stack([values, *(values[order] for order in orders)], 2)


@dataclass(frozen=True)
class LayerProbe:
    """The probe of one layer: sums over each text's rows, [text, target] and [text, target, permutation].

    `error` is Σ (y − ŷ)², `spread` Σ (y − ȳ)² with ȳ the mean of the rows that the probe was fitted on, `null_error`
    the error for permuted positions. They are NaN for a text with fewer than two usable rows, whose spread can be 0.
    """

    error: np.ndarray
    spread: np.ndarray
    null_error: np.ndarray
    fitted: CrossValidation | None

    @property
    def r2(self) -> np.ndarray:
        """1 − error / spread [text, target]; NaN for a text with fewer than two usable rows."""
        return _explained(self.error, self.spread)

    @property
    def null(self) -> np.ndarray:
        """The mean of r2 over permutations, [text, target]."""
        nulls: np.ndarray = _explained(self.null_error, self.spread[..., None]).mean(-1)
        return nulls

    def pooled_null(self, target: int) -> float:
        """Return R² of permuted positions over all texts, mean over permutations; NaN without a text."""
        import numpy as np

        present = self.spread[:, target] > 0
        if not present.any():
            return float("nan")
        errors = self.null_error[present, target].sum(0)
        return float(np.mean(1 - errors / self.spread[present, target].sum()))


def _explained(error: np.ndarray, spread: np.ndarray) -> np.ndarray:
    import numpy as np

    shares: np.ndarray = np.divide(error, spread, out=np.full(error.shape, np.nan), where=spread > 0)
    return 1 - shares


def fold_numbers(contents: Sequence[str], n_folds: int) -> list[int]:
    """Return the fold of each text: the distinct contents in order, in turn. Texts of equal content share a fold.

    >>> fold_numbers(["b", "a", "b", "c"], 2)
    [1, 0, 1, 0]
    """
    ranks = {content: rank for rank, content in enumerate(sorted(set(contents)))}
    return [ranks[content] % n_folds for content in contents]


def probe_layer(
    texts: Sequence[SampledText], layer: int, *, n_folds: int, n_permutations: int, seed: int
) -> LayerProbe:
    """Fit and test the probe of one layer; nothing is fitted with fewer than three different usable texts."""
    import numpy as np

    shape = len(texts), len(TARGETS)
    error, spread = np.full(shape, np.nan), np.full(shape, np.nan)
    null_error = np.full((*shape, n_permutations), np.nan)
    usable = [index for index, text in enumerate(texts) if is_usable(text, layer)]
    contents = [texts[index].content for index in usable]
    n_folds = min(n_folds, len(set(contents)))
    if n_folds < FEWEST_FOLDS:
        return LayerProbe(error, spread, null_error, None)
    targets = [texts[index].targets(n_permutations, seed) for index in usable]
    rows = [texts[index].rows[layer].astype(np.float64) for index in usable]
    flat_targets = [values.reshape(len(values), -1) for values in targets]
    fold_of = fold_numbers(contents, n_folds)
    fitted = cross_validate(rows, flat_targets, fold_of)
    for index, values, predictions, fold in zip(usable, targets, fitted.predictions, fold_of, strict=True):
        if len(values) < 2:
            continue
        errors = np.square(values - predictions.reshape(values.shape)).sum(0)
        error[index], null_error[index] = errors[:, 0], errors[:, 1:]
        means = fitted.folds[fold].target_means.reshape(values.shape[1:])[:, 0]
        spread[index] = np.square(values[..., 0] - means).sum(0)
    return LayerProbe(error, spread, null_error, fitted)


def is_usable(text: SampledText, layer: int) -> bool:
    """Return whether the text has rows in the layer, all of them finite."""
    import numpy as np

    rows = text.rows.get(layer)
    return rows is not None and len(rows) > 0 and bool(np.isfinite(rows).all())
