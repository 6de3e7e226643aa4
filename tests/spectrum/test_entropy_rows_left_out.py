"""Spectra without rows that are left out: hard rows, small scales, many rows, and their reported error."""

from __future__ import annotations

import math

import pytest
import torch

from phaselens.spectrum import Spectrum, _entropy, spectra, spectrum
from tests.spectrum.reference import dense

SHAPES = [(3, 8), (6, 6), (9, 4)]


def gaussian(n_pos: int, d_model: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_pos, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(x: torch.Tensor, *rows: int) -> tuple[tuple[Spectrum, Spectrum], torch.Tensor]:
    """Return the spectra with and without `rows`, and the rows that remain."""
    left_out = torch.zeros(len(x), dtype=torch.bool)
    left_out[list(rows)] = True
    return spectra(x, left_out), x[~left_out]


def assert_within_error(measured: Spectrum, x: torch.Tensor) -> None:
    entropy, anisotropy = dense(x)
    assert abs(measured.entropy - entropy) <= measured.error + 1e-14
    assert measured.anisotropy == pytest.approx(anisotropy, rel=1e-7)
    assert measured.n_directions == min(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_left_out_are_left_out_whatever_their_number(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    for rows in ((), (1,), (0, 2), (1, 2)):
        (full, remaining), other_rows = without(x, *rows)
        assert_within_error(full, x)
        assert_within_error(remaining, other_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("gain", [700.0, 1e4, 1e7])
def test_a_large_row_costs_no_digits_at_any_scale(shape: tuple[int, int], scale: float, gain: float) -> None:
    """The energy of the row is 5e5, 1e8 and 1e14 times that of another: subtraction would keep few digits, or none."""
    for seed in range(4):
        x = gaussian(*shape, seed)
        x[2] *= gain
        (full, remaining), other_rows = without(x * scale, 2)
        assert_within_error(full, x)
        assert_within_error(remaining, other_rows)
        assert remaining.error < 1e-7, "so that the check above says something"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_does_not_depend_on_the_scale(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    expected, _ = without(x, 1)
    measured, _ = without(x * 2**-10, 1)
    for result, other in zip(measured, expected, strict=True):
        assert result.error == pytest.approx(other.error, rel=1e-9)
        assert 0 < result.error < 1e-12


@pytest.mark.parametrize(
    "direction",
    [(1.0, 0, 0), (-1.0, 0, 0), (0, 1.0, 0), (0, -1.0, 0), (1.0, 1e-7, 0), (-1.0, 1e-7, 0), (-1.0, -1e-7, 0)],
)
def test_a_row_may_lie_along_a_coordinate(direction: tuple[float, ...]) -> None:
    x = gaussian(8, 3)
    x[4] = 50 * torch.tensor(direction, dtype=torch.float64)
    (full, remaining), other_rows = without(x, 4)
    assert_within_error(full, x)
    assert_within_error(remaining, other_rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_row_changes_nothing_but_the_number_of_rows(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    x[1] = 0.0
    (full, remaining), other_rows = without(x, 1)
    assert_within_error(remaining, other_rows)
    assert remaining.entropy == pytest.approx(full.entropy, abs=1e-13)


def test_the_only_row_and_the_only_dimension() -> None:
    (full, remaining), _ = without(gaussian(1, 5), 0)
    assert full.entropy == 0
    assert math.isnan(remaining.entropy)
    (full, remaining), _ = without(gaussian(5, 1), 0)
    assert full.entropy == remaining.entropy == 0
    assert math.isnan(full.entropy_normalised)


def test_squares_beyond_the_largest_number_have_no_spectrum() -> None:
    for shape in SHAPES:
        x = gaussian(*shape)
        x[0] = 1e200
        (full, remaining), other_rows = without(x, 1)
        assert math.isnan(full.entropy)
        assert math.isnan(remaining.entropy)
        (full, remaining), other_rows = without(x, 0)
        assert math.isnan(full.entropy)
        assert_within_error(remaining, other_rows)


@pytest.mark.parametrize("shape", [(10, 4), (4, 10)])
def test_rows_may_come_in_several_chunks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_entropy, "CHUNK", 3)
    x = gaussian(*shape)
    assert_within_error(spectrum(x), x)
    (_, remaining), other_rows = without(x, 2)
    assert_within_error(remaining, other_rows)


def test_a_spectrum_needs_no_gradient_but_accepts_one() -> None:
    x = gaussian(6, 4)
    left_out = torch.arange(6) == 1
    assert spectra(x.clone().requires_grad_(), left_out) == spectra(x, left_out)


@pytest.mark.parametrize(("name", "outputs"), [("dsytrd", 5), ("dsterf", 2)])
def test_a_failure_of_lapack_is_an_error(name: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.linalg import lapack

    monkeypatch.setattr(lapack, name, lambda *_, **__: (*[None] * (outputs - 1), 3))
    with pytest.raises(ArithmeticError, match=name):
        spectrum(gaussian(5, 4))


@pytest.mark.parametrize("function", [spectrum, lambda x: spectra(x, torch.zeros(3, dtype=torch.bool))])
def test_errors_name_the_matrix(function: object) -> None:
    with pytest.raises(ValueError, match=r"expected x as a tensor \[pos, d_model\], received a tensor \[3\]"):
        function(torch.zeros(3))  # type: ignore[operator]
