"""Bounds of the entropy and the anisotropy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from phaselens.errors import InputError
from phaselens.spectrum import (
    Bound,
    Spectrum,
    compression_bound,
    continuity_bound,
    require_bound,
    spectrum,
)

DATA = Path(__file__).parents[1] / "data"
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())


def test_continuity_bound_covers_every_pair_of_distributions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 12))
        p, q = rng.dirichlet(np.ones(n) * 0.5), rng.dirichlet(np.ones(n) * 0.5)
        mixed = p + (q - p) * 10.0 ** -rng.integers(0, 7)
        entropies = [
            -(distribution[distribution > 0] * np.log(distribution[distribution > 0])).sum()
            for distribution in (p, mixed)
        ]
        assert abs(entropies[0] - entropies[1]) <= continuity_bound(0.5 * abs(p - mixed).sum(), n) + 1e-12


def test_bound_of_the_fixture() -> None:
    expected = FIXTURES["representation"]
    x = torch.tensor(expected["X"], dtype=torch.float64)
    bound = compression_bound(x)
    theorem = expected["theorem"]
    assert bound.anisotropy == pytest.approx(theorem["p_lower_bound_on_p1"], abs=1e-12)
    assert bound.entropy == pytest.approx(theorem["entropy_upper_bound_nats"], abs=1e-12)
    assert (bound.ratio, bound.alignment) == pytest.approx((theorem["c"], theorem["alpha"]))
    require_bound(spectrum(x), bound)
    with pytest.raises(ArithmeticError, match="below its bound"):
        require_bound(spectrum(x[1:]), bound)


def test_an_entropy_above_its_bound_is_an_error_and_so_is_an_anisotropy_below() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] *= 20
    measured, bound = spectrum(x), compression_bound(x)
    require_bound(measured, bound)
    with pytest.raises(ArithmeticError, match=r"entropy = .* is above its bound"):
        require_bound(measured._replace(entropy=bound.entropy * 1.001), bound)
    with pytest.raises(ArithmeticError, match=r"p1 = .* is below its bound"):
        require_bound(measured._replace(anisotropy=bound.anisotropy * 0.999), bound)


@pytest.mark.parametrize(
    "rows",
    [[[1.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]], [[1.0, float("inf")], [1.0, 2.0]]],
)
def test_rows_that_set_no_bound_give_nan_and_forbid_nothing(rows: list[list[float]]) -> None:
    bound = compression_bound(torch.tensor(rows))
    assert math.isnan(bound.anisotropy)
    assert math.isnan(bound.entropy)
    require_bound(spectrum(torch.eye(2)), bound)


@pytest.mark.parametrize(
    "rows", [[], [[1.0, 2.0]], [[1.0, 2.0], [math.inf, 1.0]], [[math.inf, 0.0], [1.0, 2.0]]]
)
def test_without_a_bound_every_field_is_nan(rows: list[list[float]]) -> None:
    assert all(math.isnan(value) for value in compression_bound(torch.tensor(rows).view(-1, 2)))


def test_the_bound_of_orthogonal_rows_is_their_spectrum() -> None:
    """Two orthogonal rows have the entropy of two outcomes; equal ones are at the limit from which there is a bound."""
    for energies in ((1.0, 1.0), (3.0, 1.0), (1e-8, 1e-9)):
        x = torch.diag(torch.tensor(energies, dtype=torch.float64).sqrt())
        p = energies[0] / sum(energies)
        bound = compression_bound(x)
        assert bound == pytest.approx(
            (p, -p * math.log(p) - (1 - p) * math.log(1 - p), energies[0] / energies[1], 0)
        )


def test_a_small_row_sets_no_bound_of_the_entropy() -> None:
    bound = compression_bound(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    assert math.isnan(bound.entropy)
    assert (bound.anisotropy, bound.ratio, bound.alignment) == pytest.approx((1 / 14, 1 / 13, 0))


def test_rows_along_row_0_have_one_direction() -> None:
    assert compression_bound(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) == pytest.approx((1, 0, 0.25, 1))
    bound = compression_bound(torch.tensor([[1.0], [2.0], [2.0]]))
    assert (bound.anisotropy, bound.ratio, bound.alignment) == pytest.approx((1, 1 / 8, 1))
    assert math.isnan(bound.entropy), "one dimension has no entropy to bound"


def test_all_rows_of_a_long_text_set_the_bound() -> None:
    x = torch.randn(700, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] *= 60
    others, energy = x[1:].numpy(), float((x[0] ** 2).sum())
    bound = compression_bound(x)
    assert bound.ratio == pytest.approx(energy / (others**2).sum())
    along = (others @ x[0].numpy()) ** 2 / energy
    assert bound.alignment == pytest.approx(along.sum() / (others**2).sum())


def test_a_spectrum_may_reach_its_bound_and_pass_it_by_the_tolerance_and_its_own_error() -> None:
    reached = Spectrum(entropy=0.5, anisotropy=0.8, effective_rank=math.exp(0.5), n_directions=4, error=0.0)
    bound = Bound(anisotropy=0.8, entropy=0.5, ratio=4.0, alignment=0.0)
    require_bound(reached, bound, tolerance=0)
    require_bound(reached._replace(entropy=0.54, anisotropy=0.75), bound, tolerance=0.1)
    require_bound(reached._replace(entropy=0.501, error=0.002), bound, tolerance=0)
    with pytest.raises(ArithmeticError, match="is above its bound"):
        require_bound(reached._replace(entropy=0.503, error=0.002), bound, tolerance=0)
    with pytest.raises(ArithmeticError, match="is above its bound"):
        require_bound(reached._replace(entropy=0.01), bound._replace(entropy=0.0), tolerance=0.1)


def test_the_continuity_bound_is_reached() -> None:
    """By one certain outcome and the distribution that moves `distance` from it to all others evenly (Audenaert)."""
    for n in (2, 3, 10):
        for distance in (1e-6, 0.25, 0.4, 1 - 1 / n):
            p = np.r_[1 - distance, np.full(n - 1, distance / (n - 1))]
            assert continuity_bound(distance, n) == pytest.approx(-(p * np.log(p)).sum())
        for distance in (0.95, 1.0, 1.5):
            assert continuity_bound(distance, n) == pytest.approx(math.log(n)), "no entropies differ by more"
    assert continuity_bound(0.5, 0) == continuity_bound(0.5, 1) == continuity_bound(0.0, 3) == 0
    assert math.isnan(continuity_bound(math.nan, 3))


EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compression_bound(torch.zeros(3)), r"expected x as a tensor \[pos, d_model\], received a .* \[3\]"),
        (
            lambda: require_bound(3, compression_bound(EYE)),
            "expected spectrum as a Spectrum from spectrum or spectra, received 3",
        ),
        (lambda: require_bound(spectrum(EYE), 3), "expected bound as a Bound from compression_bound, received 3"),
        (
            lambda: require_bound(spectrum(EYE), compression_bound(EYE), tolerance=-1),
            "expected tolerance as a number of at least 0, received -1",
        ),
        (lambda: continuity_bound("0", 3), "expected distance as a number, received '0'"),
        (lambda: continuity_bound(0.1, -1), "expected n as a whole number of at least 0, received -1"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_of_a_bound(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
