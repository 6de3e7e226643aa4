"""How a text's activations fill their space: matrix entropy, anisotropy and effective rank, in float64.

x [pos, d_model] are one text's rows, pads left out, neither centred nor normalised. With singular values s,
p_j = s_j² / Σ s², from the eigenvalues of the Gram matrix of the smaller side. A Gram matrix in float32 loses the
small eigenvalues beside one row of norm 3000, so rows are widened before anything is multiplied.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phaselens.errors import InputError, require_number, require_whole
from phaselens.spectrum._rows import require_matrix

Floats = NDArray[np.float64]

CHUNK = 4096
"""Rows widened to float64 at a time."""
_EPS = float(np.finfo(np.float64).eps) / 2
_ALONE_UP_TO = 1024
"""Matrices up to this size are worked on faster by one thread than by several."""
_CANCELS = 1e6
"""One row is taken out of a spectrum by subtraction only while it has at most this many times the others' energy."""


class Spectrum(NamedTuple):
    """Entropy in nats; p₁; exp(entropy); the most directions there could be; and a bound on the entropy's error.

    `error` bounds the rounding of this module's float64 arithmetic, of the Gram matrix and its eigenvalues, for the
    rows as they were given. How far those are from exact activations, by the rounding of a forward, it cannot say.
    """

    entropy: float
    anisotropy: float
    effective_rank: float
    n_directions: int
    error: float

    @property
    def entropy_normalised(self) -> float:
        """Entropy over ln min(pos, d_model), 0 to 1; NaN where there is one direction only."""
        return self.entropy / math.log(self.n_directions) if self.n_directions > 1 else math.nan


NOTHING = Spectrum(math.nan, math.nan, math.nan, 0, math.nan)


def spectrum(x: Tensor) -> Spectrum:
    """x [pos, d_model] → its `Spectrum`; NaN where x has no row, is all zero or is not finite.

    H = −Σ p ln p of p = s² / Σ s² (Queipo-de-Llano et al. 2025, arXiv:2510.06477, section 3).

    >>> found = spectrum(torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    >>> round(found.entropy, 6), round(found.anisotropy, 6), round(found.entropy_normalised, 6)
    (0.181228, 0.962455, 0.164961)
    """
    require_matrix("x", x)
    if not x.numel():
        return NOTHING
    with _few_threads(min(x.shape)):
        gram = _gram(x)
        if not bool(np.isfinite(gram.diagonal()).all()):
            return NOTHING
        return _of(_eigenvalues(*_tridiagonal(gram)), tuple(x.shape))


def spectra(x: Tensor, left_out: Tensor) -> tuple[Spectrum, Spectrum]:
    """x [pos, d_model], left_out bool [pos] → the `Spectrum` of all rows, and of the rows that are not left out.

    Leaving out one row costs nearly nothing: its direction is the first vector of the basis in which the Gram matrix
    is made tridiagonal, so that taking the row out changes one number of that matrix.

    >>> x = torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    >>> both = spectra(x, torch.tensor([True, False, False, False]))
    >>> [round(each.entropy, 4) for each in both]
    [0.1812, 0.8676]
    """
    require_matrix("x", x)
    if not isinstance(left_out, Tensor) or left_out.dtype != torch.bool or left_out.shape != x.shape[:1]:
        raise InputError(f"expected left_out as bool [pos] = ({len(x)},), received {left_out!r}")
    if not bool(left_out.any()):
        found = spectrum(x)
        return found, found
    places = left_out.nonzero()[:, 0]
    if len(places) == 1 and min(x.shape) > 1:
        with _few_threads(min(x.shape)):
            both = _without_one(x, int(places[0]))
        if both is not None:
            return both
    return spectrum(x), spectrum(x[~left_out])


def _gram(x: Tensor) -> Floats:
    """Float64 Gram matrix of the smaller side; only its lower triangle is filled."""
    from scipy.linalg import blas

    by_rows = x.shape[0] <= x.shape[1]
    if x.device.type != "cpu":
        total = torch.zeros((min(x.shape),) * 2, dtype=torch.float64, device=x.device)
        for part in [x] if by_rows else chunks(x):
            wide = part.double()
            total += wide @ wide.T if by_rows else wide.T @ wide
        return np.asfortranarray(total.cpu().numpy())
    gram = np.zeros((min(x.shape),) * 2, order="F")
    for part in [x] if by_rows else chunks(x):
        # A row-major matrix is, to BLAS, its own transpose.
        columns = part.double().contiguous().numpy().T
        gram = blas.dsyrk(1.0, columns, beta=1.0, c=gram, trans=by_rows, lower=1, overwrite_c=1)
    return gram


def _few_threads(size: int) -> AbstractContextManager[Any]:
    """Let scipy's BLAS use one thread on a small matrix, else as many as torch.

    Left alone it takes all there are, even for a product of 512 numbers, and they go on spinning for milliseconds
    after it: whatever torch does meanwhile with its own threads takes several times as long.
    """
    n_threads = 1 if size <= _ALONE_UP_TO else torch.get_num_threads()
    limit: AbstractContextManager[Any] = _blas().limit(limits=n_threads)
    return limit


@functools.cache
def _blas() -> Any:
    import scipy.linalg.blas  # noqa: F401 - loads the library that is looked for
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")


def chunks(x: Tensor, n_rows: int = CHUNK) -> list[Tensor]:
    return [x[start : start + n_rows] for start in range(0, len(x), n_rows)]


def _tridiagonal(gram: Floats) -> tuple[Floats, Floats]:
    """(diagonal, beside it) of a tridiagonal matrix with the same eigenvalues; the first basis vector stays. Uses
    the lower triangle, and overwrites it."""
    from scipy.linalg import lapack

    if len(gram) == 1:
        return gram[0].copy(), np.zeros(0)
    _, diagonal, beside, _, failed = lapack.dsytrd(gram, lower=1, lwork=64 * len(gram), overwrite_a=1)
    if failed:
        raise ArithmeticError(f"a Gram matrix {gram.shape} could not be made tridiagonal (dsytrd: {failed})")
    return diagonal, beside


def _eigenvalues(diagonal: Floats, beside: Floats) -> Floats:
    from scipy.linalg import lapack

    if len(diagonal) == 1:
        return diagonal
    values, failed = lapack.dsterf(diagonal, beside)
    if failed:
        raise ArithmeticError(f"{failed} eigenvalues of {len(diagonal)} did not converge (dsterf)")
    found: Floats = values
    return found


def _of(eigenvalues: Floats, shape: tuple[int, ...], *, energy: float = 0.0) -> Spectrum:
    """`energy` is what the rounding is relative to, where it is more than the eigenvalues' sum."""
    values = np.maximum(
        eigenvalues, 0.0
    )  # what is below 0 is rounding: a Gram matrix has no negative eigenvalue
    total = float(values.sum())
    if not total > 0:
        return NOTHING
    p = values / total
    p = p[p > 0]
    entropy = max(0.0, -float((p * np.log(p)).sum()))
    n = min(shape)
    distance = 0.5 * n * (max(shape) + n) * _EPS * (max(energy, total) / total)
    return Spectrum(entropy, float(p.max()), math.exp(entropy), n, continuity_bound(distance, n))


def continuity_bound(distance: float, n: int) -> float:
    """By how much the entropy of two distributions over `n` outcomes can differ, in nats, at most, if their
    total variation distance is `distance` (Fannes 1973; Audenaert 2007).

    >>> continuity_bound(0.0, 10), round(continuity_bound(1e-9, 512), 10)
    (0.0, 2.8e-08)
    """
    require_number("distance", distance, or_nan=True)
    require_whole("n", n, 0)
    if distance <= 0 or n < 2:
        return 0.0
    if distance >= 1 - 1 / n:
        return math.log(n)
    return distance * math.log(n - 1) - distance * math.log(distance) - (1 - distance) * math.log1p(-distance)


def _without_one(x: Tensor, row: int) -> tuple[Spectrum, Spectrum] | None:
    """Both spectra from one tridiagonal matrix whose first basis vector is the row (or its coordinate); None where
    that would lose too much of the second."""
    by_rows = x.shape[0] <= x.shape[1]
    if by_rows and row:
        x = torch.cat([x[row : row + 1], x[:row], x[row + 1 :]])
        row = 0
    gram = _gram(x)
    first = x[row].double().cpu().numpy()
    energy = float(first @ first)
    if not 0 < energy < _CANCELS * (float(gram.trace()) - energy) < math.inf:
        return None
    if not by_rows:
        gram = _reflected(gram, first)
    diagonal, beside = _tridiagonal(gram)
    everything = _eigenvalues(diagonal, beside)
    if by_rows:
        diagonal, beside = diagonal[1:], beside[1:]
    else:
        diagonal = np.concatenate([diagonal[:1] - energy, diagonal[1:]])
    whole = float(np.maximum(everything, 0.0).sum())
    smaller = (x.shape[0] - 1, x.shape[1])
    return _of(everything, tuple(x.shape)), _of(_eigenvalues(diagonal, beside), smaller, energy=whole)


def _reflected(gram: Floats, first: Floats) -> Floats:
    """The same matrix (lower triangle) in a basis that starts with `first`'s direction: one Householder reflection."""
    from scipy.linalg import blas

    v = first / np.linalg.norm(first)
    v[0] += 1.0 if v[0] >= 0 else -1.0
    v /= np.linalg.norm(v)
    image = blas.dsymv(1.0, gram, v, lower=1)
    w = 2.0 * (image - (v @ image) * v)
    found: Floats = blas.dsyr2(-1.0, v, w, a=gram, lower=1, overwrite_a=1)
    return found
