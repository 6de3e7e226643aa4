"""Matrix entropy, anisotropy and effective rank of a text's activations, in float64.

x [pos, d_model] are one text's rows without pads, neither centred nor normalised. With singular values s,
p_j = s_j² / Σ s², from the eigenvalues of the Gram matrix of the smaller side. A Gram matrix in float32 loses the
small eigenvalues beside one row of norm 3000, so rows are widened before they are multiplied.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phaselens.errors import FloatArray, InputError, require_number, require_whole
from phaselens.spectrum._rows import chunks, require_matrix

CHUNK = 4096
"""Rows widened to float64 at a time."""
_EPS = float(np.finfo(np.float64).eps) / 2
_ONE_THREAD_UP_TO = 1024
"""Largest size of a matrix for which one thread is faster than several."""
_MAX_ENERGY_RATIO = 1e6
"""A row is removed from a spectrum by subtraction only while its energy is at most this multiple of the others'."""


class Spectrum(NamedTuple):
    """Entropy in nats, p₁, exp(entropy), the largest possible number of directions, and a bound on the entropy's error.

    `error` bounds the effect of float64 rounding in the Gram matrix and its eigenvalues, for the rows as they are
    passed. It does not cover the rounding of the forward that computed the rows.
    """

    entropy: float
    anisotropy: float
    effective_rank: float
    n_directions: int
    error: float

    @property
    def entropy_normalised(self) -> float:
        """Entropy over ln min(pos, d_model), 0 to 1; NaN where there is only one direction."""
        return self.entropy / math.log(self.n_directions) if self.n_directions > 1 else math.nan


MISSING = Spectrum(math.nan, math.nan, math.nan, 0, math.nan)


def spectrum(x: Tensor) -> Spectrum:
    """Return the `Spectrum` of x [pos, d_model]; NaN if x has no row, is all zero or is not finite.

    H = −Σ p ln p of p = s² / Σ s² (Queipo-de-Llano et al. 2025, arXiv:2510.06477, section 3).

    >>> s = spectrum(torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    >>> round(s.entropy, 6), round(s.anisotropy, 6), round(s.entropy_normalised, 6)
    (0.181228, 0.962455, 0.164961)
    """
    require_matrix("x", x)
    if not x.numel():
        return MISSING
    with _limited_threads(min(x.shape)):
        gram = _gram(x)
        if not bool(np.isfinite(gram.diagonal()).all()):
            return MISSING
        return _from_eigenvalues(_eigenvalues(*_tridiagonal(gram)), tuple(x.shape))


def spectra(x: Tensor, left_out: Tensor) -> tuple[Spectrum, Spectrum]:
    """Return the `Spectrum` of all rows of x [pos, d_model], and of the rows without those in left_out, bool [pos].

    Leaving out one row costs almost nothing: its direction is the first vector of the basis in which the Gram matrix
    is made tridiagonal, so that removing the row changes one number of that matrix.

    Raises:
        InputError: unless left_out is bool [pos].

    >>> x = torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    >>> pair = spectra(x, torch.tensor([True, False, False, False]))
    >>> [round(s.entropy, 4) for s in pair]
    [0.1812, 0.8676]
    """
    require_matrix("x", x)
    if not isinstance(left_out, Tensor) or left_out.dtype != torch.bool or left_out.shape != x.shape[:1]:
        raise InputError(f"expected left_out as bool [pos] = ({len(x)},), received {left_out!r}")
    if not bool(left_out.any()):
        full_spectrum = spectrum(x)
        return full_spectrum, full_spectrum
    rows = left_out.nonzero()[:, 0]
    if len(rows) == 1 and min(x.shape) > 1:
        with _limited_threads(min(x.shape)):
            pair = _leave_one_out(x, int(rows[0]))
        if pair is not None:
            return pair
    return spectrum(x), spectrum(x[~left_out])


def _gram(x: Tensor) -> FloatArray:
    """Return the float64 Gram matrix of the smaller side; only its lower triangle is filled."""
    from scipy.linalg import blas

    by_rows = x.shape[0] <= x.shape[1]
    parts = [x] if by_rows else chunks(x, CHUNK)
    if x.device.type != "cpu":
        total = torch.zeros((min(x.shape),) * 2, dtype=torch.float64, device=x.device)
        for part in parts:
            wide = part.detach().double()
            total += wide @ wide.T if by_rows else wide.T @ wide
        return np.asfortranarray(total.cpu().numpy())
    gram = np.zeros((min(x.shape),) * 2, order="F")
    for part in parts:
        # BLAS reads a row-major matrix as its transpose.
        columns = part.detach().double().contiguous().numpy().T
        gram = blas.dsyrk(1.0, columns, beta=1.0, c=gram, trans=by_rows, lower=1, overwrite_c=1)
    return gram


def _limited_threads(size: int) -> AbstractContextManager[object]:
    """Limit scipy's BLAS to one thread on a small matrix, and to torch's number of threads on a large one.

    By default it uses all threads, even for a product of 512 numbers, and these keep spinning for milliseconds
    afterwards, which slows down torch's own threads several times.
    """
    n_threads = 1 if size <= _ONE_THREAD_UP_TO else torch.get_num_threads()
    limit: AbstractContextManager[object] = _blas().limit(limits=n_threads)
    return limit


@functools.cache
def _blas() -> Any:
    import scipy.linalg.blas  # noqa: F401 - loads the library that is selected below
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")


def _tridiagonal(gram: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return (diagonal, off-diagonal) of a tridiagonal matrix with the same eigenvalues and first basis vector.

    Reads the lower triangle of `gram`, and overwrites it.
    """
    from scipy.linalg import lapack

    if len(gram) == 1:
        return gram[0].copy(), np.zeros(0)
    _, diagonal, off_diagonal, _, failed = lapack.dsytrd(gram, lower=1, lwork=64 * len(gram), overwrite_a=1)
    if failed:
        raise ArithmeticError(f"a Gram matrix {gram.shape} could not be made tridiagonal (dsytrd: {failed})")
    return diagonal, off_diagonal


def _eigenvalues(diagonal: FloatArray, off_diagonal: FloatArray) -> FloatArray:
    from scipy.linalg import lapack

    if len(diagonal) == 1:
        return diagonal
    values, failed = lapack.dsterf(diagonal, off_diagonal)
    if failed:
        raise ArithmeticError(f"{failed} eigenvalues of {len(diagonal)} did not converge (dsterf)")
    eigenvalues: FloatArray = values
    return eigenvalues


def _from_eigenvalues(eigenvalues: FloatArray, shape: tuple[int, ...], *, energy: float = 0.0) -> Spectrum:
    """Make the spectrum of a matrix of this `shape`; rounding is relative to max(`energy`, sum of eigenvalues)."""
    # A Gram matrix has no negative eigenvalues, so values below 0 are rounding.
    values = np.maximum(eigenvalues, 0.0)
    total = float(values.sum())
    if not total > 0:
        return MISSING
    p = values / total
    p = p[p > 0]
    entropy = max(0.0, -float((p * np.log(p)).sum()))
    n = min(shape)
    distance = 0.5 * n * (max(shape) + n) * _EPS * (max(energy, total) / total)
    return Spectrum(entropy, float(p.max()), math.exp(entropy), n, continuity_bound(distance, n))


def continuity_bound(distance: float, n: int) -> float:
    """Bound the entropy difference, in nats, of two distributions over `n` outcomes at a total variation `distance`.

    Fannes 1973; Audenaert 2007.

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


def _leave_one_out(x: Tensor, row: int) -> tuple[Spectrum, Spectrum] | None:
    """Return the spectra with and without `row`; None if the second would lose too many digits.

    Both come from one tridiagonal matrix whose first basis vector is the row (or its coordinate).
    """
    by_rows = x.shape[0] <= x.shape[1]
    if by_rows and row:
        x = torch.cat([x[row : row + 1], x[:row], x[row + 1 :]])
        row = 0
    gram = _gram(x)
    row_values = x[row].detach().double().cpu()
    energy = float(row_values @ row_values)
    if not 0 < energy < _MAX_ENERGY_RATIO * (float(gram.trace()) - energy) < math.inf:
        return None
    if not by_rows:
        gram = _reflected(gram, row_values.numpy())
    diagonal, off_diagonal = _tridiagonal(gram)
    all_eigenvalues = _eigenvalues(diagonal, off_diagonal)
    if by_rows:
        diagonal, off_diagonal = diagonal[1:], off_diagonal[1:]
    else:
        diagonal = np.concatenate([diagonal[:1] - energy, diagonal[1:]])
    total_energy = float(np.maximum(all_eigenvalues, 0.0).sum())
    with_row = _from_eigenvalues(all_eigenvalues, tuple(x.shape))
    remaining = _eigenvalues(diagonal, off_diagonal)
    without_row = _from_eigenvalues(remaining, (x.shape[0] - 1, x.shape[1]), energy=total_energy)
    return with_row, without_row


def _reflected(gram: FloatArray, direction: FloatArray) -> FloatArray:
    """Return `gram` (lower triangle) in a basis whose first vector is `direction`, by one Householder reflection."""
    from scipy.linalg import blas

    v = direction / np.linalg.norm(direction)
    v[0] += 1.0 if v[0] >= 0 else -1.0
    v /= np.linalg.norm(v)
    image = blas.dsymv(1.0, gram, v, lower=1)
    w = 2.0 * (image - (v @ image) * v)
    reflected: FloatArray = blas.dsyr2(-1.0, v, w, a=gram, lower=1, overwrite_a=1)
    return reflected
