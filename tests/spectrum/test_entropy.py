"""Spectra against dense float64 and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens.spectrum import compression_bound, continuity_bound, require_bound, spectra, spectrum
from tests.spectrum.reference import dense

DATA = Path(__file__).parents[1] / "data"
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 30.0, 3000.0, 1e5]),
)  # fmt: skip
def test_spectra_of_any_shape_agree_with_dense_float64(
    n_pos: int, d_model: int, seed: int, gain: float
) -> None:
    """Spectra with and without the spiked row are within their reported error."""
    x = torch.randn(n_pos, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row = seed % n_pos
    x[row] *= gain
    left_out = torch.zeros(n_pos, dtype=torch.bool)
    left_out[row] = True
    for result, rows in zip(spectra(x, left_out), (x, x[~left_out]), strict=True):
        entropy, anisotropy = dense(rows)
        assert abs(result.entropy - entropy) <= result.error + 1e-13
        assert result.anisotropy == pytest.approx(anisotropy, rel=1e-8)
        assert result.error < 1e-3
    require_bound(spectrum(x), compression_bound(x))


def test_the_spectrum_agrees_with_closed_forms() -> None:
    rank_one = torch.outer(torch.rand(7) + 0.1, torch.rand(5))
    assert spectrum(rank_one).entropy == pytest.approx(0.0, abs=1e-6), "rank 1 up to float32 rounding"
    assert spectrum(3 * torch.eye(6)).entropy == pytest.approx(math.log(6), abs=1e-12)
    assert spectrum(torch.eye(6)[:4]).entropy_normalised == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(spectrum(torch.zeros(3, 3)).entropy)
    assert math.isnan(spectrum(torch.full((3, 3), torch.nan)).entropy)
    assert math.isnan(spectrum(torch.zeros(0, 3)).entropy)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    gaps = []
    for gain in (1.0, 10.0, 1000.0):
        x[0] *= gain
        gaps.append(compression_bound(x).entropy - spectrum(x).entropy)
    assert gaps[-1] < 1e-3 * gaps[0], "the bound becomes tight as one row grows"


@pytest.mark.parametrize(("n_pos", "d_model"), [(16, 48), (48, 16), (64, 64)])
def test_the_error_is_that_of_the_roundings_of_a_gram_matrix(n_pos: int, d_model: int) -> None:
    """Products of the larger side, and eigenvalues of the smaller one, each rounded by at most 2⁻⁵³ of the energy."""
    smaller, larger = sorted((n_pos, d_model))
    distance = smaller * (larger + smaller) / 2 * 2.0**-53
    x = torch.randn(n_pos, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert spectrum(x).error == pytest.approx(continuity_bound(distance, smaller), rel=1e-12)


def test_unsquared_singular_values_give_another_entropy() -> None:
    expected = FIXTURES["representation"]
    x = torch.tensor(expected["X"], dtype=torch.float64)
    measured_spectrum = spectrum(x)
    assert measured_spectrum.entropy == pytest.approx(expected["entropy_nats"], abs=1e-12)
    assert measured_spectrum.entropy_normalised == pytest.approx(
        expected["entropy_norm_log_min_T_d"], abs=1e-12
    )
    assert measured_spectrum.anisotropy == pytest.approx(expected["anisotropy_p1"], abs=1e-12)
    assert measured_spectrum.effective_rank == pytest.approx(expected["effective_rank"], abs=1e-12)
    singular_values = np.linalg.svd(x.numpy(), compute_uv=False)
    p = singular_values / singular_values.sum()
    p = p[p > 1e-15]
    unsquared_entropy = -(p * np.log(p)).sum()
    assert unsquared_entropy == pytest.approx(expected["WRONG_entropy_from_unsquared_sigma_nats"], abs=1e-6)
    assert unsquared_entropy > 3 * measured_spectrum.entropy
