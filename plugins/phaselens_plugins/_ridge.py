"""Ridge regression of several targets, cross-validated over folds of texts. float64 throughout.

A model is fitted on the rows of all texts but those of one fold, and predicts that fold. Its penalty is the one whose
models, fitted without a further fold, predict that further fold best; so no number depends on the text that it is
tested on. Penalties are multiples of the mean squared norm of the centred rows, so that a factor of all activations
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

PENALTIES = tuple(10.0**exponent for exponent in range(4, -9, -1))
"""Penalties that are tried, from the largest; the first of equals is taken."""
FEWEST_FOLDS = 3
"""One fold to test on, one to choose the penalty on, one to fit on."""


@dataclass(frozen=True)
class RidgeFit:
    """A ridge regression of targets [row, target] on rows [row, d], for all `PENALTIES`.

    `components` [d, component] and `coordinates` [component, target] give the coefficients of a penalty:
    components · coordinates / (eigenvalues + penalty · scale).
    """

    mean: np.ndarray
    target_mean: np.ndarray
    components: np.ndarray
    eigenvalues: np.ndarray
    coordinates: np.ndarray
    scale: float

    @classmethod
    def of(cls, rows: np.ndarray, targets: np.ndarray) -> RidgeFit:
        """Fit by the eigenvectors of the smaller of the two Gram matrices."""
        import numpy as np
        from scipy.linalg import eigh

        mean, target_mean = rows.mean(0), targets.mean(0)
        centred, centred_targets = rows - mean, targets - target_mean
        n, d = rows.shape
        if n <= d:
            eigenvalues, vectors = eigh(centred @ centred.T)
            components, coordinates = centred.T @ vectors, vectors.T @ centred_targets
        else:
            eigenvalues, components = eigh(centred.T @ centred)
            coordinates = components.T @ (centred.T @ centred_targets)
        # Rounding puts eigenvalues of 0 a little below it.
        eigenvalues = np.where(eigenvalues > 0, eigenvalues, 0.0)
        return cls(mean, target_mean, components, eigenvalues, coordinates, float(eigenvalues.sum()) / n)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Return predictions [penalty, row, target]."""
        import numpy as np

        projected = (rows - self.mean) @ self.components
        # With rows that are all equal there is nothing to divide by, and nothing to add to the mean.
        divisors = [self.eigenvalues + penalty * (self.scale or 1.0) for penalty in PENALTIES]
        offsets = [projected @ (self.coordinates / divisor[:, None]) for divisor in divisors]
        predictions: np.ndarray = np.stack(offsets) + self.target_mean
        return predictions


@dataclass(frozen=True)
class FoldResult:
    """The models of one fold: their penalties [target], the means [target] of the targets that they were fitted on, and
    the numbers of rows they were fitted and tested on."""

    penalties: np.ndarray
    target_means: np.ndarray
    n_fitted: int
    n_tested: int


@dataclass(frozen=True)
class CrossValidation:
    """Predictions [row, target] of each text by models that have not seen it, and what was fitted, by fold."""

    predictions: Sequence[np.ndarray]
    folds: Mapping[int, FoldResult]


def cross_validate(
    rows: Sequence[np.ndarray], targets: Sequence[np.ndarray], fold_of: Sequence[int]
) -> CrossValidation:
    """Predict the targets [row, target] of each text from its rows [row, d], by ridge regressions on other folds.

    `fold_of` is the fold of each text; at least `FEWEST_FOLDS` are needed. Sums of squared errors over the rows of the
    inner folds choose the penalty, for each target by itself.
    """
    import numpy as np

    folds = sorted(set(fold_of))
    if len(folds) < FEWEST_FOLDS:
        raise ValueError(f"expected at least {FEWEST_FOLDS} folds, received {len(folds)}")

    def joined(arrays: Sequence[np.ndarray], chosen: set[int]) -> np.ndarray:
        return np.concatenate([array for array, fold in zip(arrays, fold_of, strict=True) if fold in chosen])

    def fit_without(left_out: set[int]) -> RidgeFit:
        chosen = set(folds) - left_out
        return RidgeFit.of(joined(rows, chosen), joined(targets, chosen))

    n_targets = targets[0].shape[1]
    errors = {fold: np.zeros((len(PENALTIES), n_targets)) for fold in folds}
    for index, first in enumerate(folds):
        for second in folds[index + 1 :]:
            fit = fit_without({first, second})
            for outer, inner in ((first, second), (second, first)):
                residuals = fit.predict(joined(rows, {inner})) - joined(targets, {inner})
                errors[outer] += np.square(residuals).sum(1)
    predictions: dict[int, np.ndarray] = {}
    results = {}
    for fold in folds:
        best = errors[fold].argmin(0)
        fit = fit_without({fold})
        for index, text_fold in enumerate(fold_of):
            if text_fold == fold:
                by_penalty = fit.predict(rows[index])
                predictions[index] = by_penalty[best, :, np.arange(n_targets)].T
        n_tested = len(joined(targets, {fold}))
        n_rows = sum(map(len, targets))
        results[fold] = FoldResult(np.array(PENALTIES)[best], fit.target_mean, n_rows - n_tested, n_tested)
    return CrossValidation([predictions[index] for index in range(len(rows))], results)
