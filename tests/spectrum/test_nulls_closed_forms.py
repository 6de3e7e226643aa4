"""Nulls of the spectrum against their closed forms: Marchenko & Pastur's law, one spike, the normal distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from phaselens.errors import InputError
from phaselens.spectrum import (
    NullSpectrum,
    _nulls,
    gaussian_exceedance,
    gaussian_max_ratio,
    random_rows,
    random_spread,
)


@pytest.mark.parametrize(("n", "d"), [(60, 60), (64, 200), (65, 200), (400, 30), (1000, 10), (10, 1000)])
def test_equal_rows_have_the_spectrum_of_marchenko_and_pastur(n: int, d: int) -> None:
    """Entropy ln m − m / 2M of the smaller m and the larger M of both numbers, and the edge (1 + √(n / d))²."""
    null = random_rows(np.full(n, 7.0), d)
    smaller, larger = sorted((n, d))
    assert null.entropy == pytest.approx(math.log(smaller) - smaller / (2 * larger), abs=1e-10)
    assert null.anisotropy == pytest.approx((1 + math.sqrt(n / d)) ** 2 / n, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(64, 64), (63, 400), (900, 100)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_spike_leaves_the_bulk_where_it_is_large_enough(n: int, d: int, scale: float) -> None:
    """The eigenvalue of such a row is w + (n / d) w / (w − 1) for n other rows of energy 1 (Baik et al. 2005)."""
    for spike in (1.2 * (1 + math.sqrt(n / d)), 100.0, 1e5):
        null = random_rows(scale * np.sqrt(np.r_[spike, np.ones(n)]), d)
        expected = (spike + n / d * spike / (spike - 1)) / (spike + n)
        assert null.anisotropy == pytest.approx(expected, rel=1e-9)
    smaller = 1 + 0.3 * math.sqrt(n / d)
    null = random_rows(scale * np.sqrt(np.r_[smaller, np.ones(n)]), d)
    edge = (1 + math.sqrt(n / d)) ** 2 / n
    assert null.anisotropy == pytest.approx(edge, rel=3 / min(n, d)), (
        "one row of that size moves the edge by 1/n"
    )


@pytest.mark.parametrize(("n", "d"), [(10, 1000), (1000, 10)])
def test_a_row_slightly_larger_than_the_others_is_not_a_spike(n: int, d: int) -> None:
    null = random_rows(np.r_[1.001, np.ones(n - 1)], d)
    assert null.anisotropy == pytest.approx(random_rows(np.ones(n), d).anisotropy, rel=1e-2)


def test_of_several_spikes_the_largest_counts_once_for_all_others() -> None:
    for n_spikes in (2, 3, 15, 16, 17):
        energies = np.r_[np.geomspace(9e8, 9, n_spikes), np.full(40, 1e-3)]
        others = energies[1:]
        expected = energies[0] + (energies[0] * others / (energies[0] - others)).sum() / 100
        assert random_rows(np.sqrt(energies), 100).anisotropy == pytest.approx(
            expected / energies.sum(), rel=1e-9
        )


def test_two_equal_spikes_repel_each_other_by_their_cosine() -> None:
    """The largest eigenvalue of two unit rows is 1 + |cosine|, whose mean is √(2 / πd)."""
    for d in (100, 10_000):
        energies = np.r_[np.full(2, 1e6), np.ones(40)]
        cosine = random_rows(np.sqrt(energies), d).anisotropy * energies.sum() / 1e6 - 1
        assert cosine == pytest.approx(math.sqrt(2 / (math.pi * d)), rel=0.15)


@pytest.mark.parametrize(("d", "expected"), [(2, 2 / math.pi), (3, 0.5)])
def test_the_cosine_of_few_dimensions_is_exact(
    monkeypatch: pytest.MonkeyPatch, d: int, expected: float
) -> None:
    monkeypatch.setattr(_nulls, "_N_DRAWS", 40_000)
    assert _nulls._largest_of_few(np.array([1.0, 1.0]), d) - 1 == pytest.approx(expected, rel=0.01)


def test_the_same_rows_have_the_same_null_each_time() -> None:
    norms = np.r_[20.0, 20.0, 20.0, np.ones(40)]
    assert random_rows(norms, 32) == random_rows(norms, 32)


def test_more_than_16_equal_spikes_are_a_bulk_of_their_own() -> None:
    for n_spikes in (17, 20, 300):
        energies = np.r_[np.full(n_spikes, 1e6), np.full(40, 1e-3)]
        edge = (1 + math.sqrt(n_spikes / 10_000)) ** 2
        assert random_rows(np.sqrt(energies), 10_000).anisotropy == pytest.approx(edge / n_spikes, rel=1e-6)


def test_zero_rows_change_nothing() -> None:
    norms = np.geomspace(1, 30, 40)
    assert random_rows(np.r_[norms, np.zeros(200)], 64) == random_rows(norms, 64)


@pytest.mark.parametrize("norms", [[1, 1], [1, 1.3], [1, 5], [1, 1, 1], [3, 0, 0], [1e6, 1], [1e3, 1, 1]])
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_nulls_of_few_rows_keep_the_limits_of_a_spectrum(norms: list[float], d: int) -> None:
    null = random_rows(norms, d)
    assert 0 <= null.entropy <= math.log(min(sum(norm > 0 for norm in norms), d))
    assert 0 < null.anisotropy <= 1
    if d > 1 and max(norms) < 2:
        assert null.entropy > 0


def test_one_direction_has_no_entropy() -> None:
    for norms, d in (([2.0], 5), ([3.0, 0.0, 0.0], 8), ([1.0, 2.0], 1), ([1e-3, 0.0], 1)):
        assert random_rows(norms, d) == NullSpectrum(0.0, 1.0)
    assert random_rows([1e6, 1.0], 8).entropy == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("norms", "d"), [([], 4), ([0.0, 0.0], 4), ([1.0, math.inf], 4), ([1.0, 2.0], 0)])
def test_rows_without_a_spectrum_have_no_null(norms: list[float], d: int) -> None:
    null = random_rows(norms, d)
    assert math.isnan(null.entropy)
    assert math.isnan(null.anisotropy)


def test_the_expected_exceedance_is_that_of_the_normal_distribution() -> None:
    """The larger of both limits counts. `share` is that of |z| above 0, 1, 1.5 or 0.25 times its median."""
    for threshold, ratio, share in (
        (3.0, 1.0, 0.311665),
        (1.0, 1.5, 0.311665),
        (0, 1, 0.5),
        (0, 0, 1),
        (0.5, 0, 0.866094),
    ):
        assert gaussian_exceedance(1000, 2.0, threshold, ratio) == pytest.approx(1000 * share, rel=1e-5)
    assert gaussian_exceedance(0, 1.0, 0.0, 0.0) == 0
    assert gaussian_exceedance(5, 0.0, 0.0, 0.0) == 0, "where the median is 0, so are all coordinates"
    assert math.isnan(gaussian_exceedance(5, math.nan, 1.0, 1.0))


def test_nulls_of_no_values_are_missing() -> None:
    assert math.isnan(gaussian_max_ratio(0))
    assert math.isnan(random_spread(0))
    assert gaussian_max_ratio(1) == pytest.approx(math.sqrt(2 / math.pi) / 0.67448975, rel=1e-5), (
        "the mean of |z|"
    )


WHOLE, NUMBER = "a whole number of at least 0, received", "a number of at least 0, received -1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_max_ratio(-1), f"expected n as {WHOLE} -1"),
        (lambda: gaussian_exceedance(-1, 1.0, 1.0, 1.0), f"expected n as {WHOLE} -1"),
        (lambda: gaussian_exceedance(5, "1", 1.0, 1.0), "expected median as a number, received '1'"),
        (lambda: gaussian_exceedance(5, 1.0, -1, 1.0), f"expected threshold as {NUMBER}"),
        (lambda: gaussian_exceedance(5, 1.0, 1.0, -1), f"expected ratio as {NUMBER}"),
        (lambda: random_rows([1.0], -1), f"expected d as {WHOLE} -1"),
        (lambda: random_rows(["a"], 4), "expected norms as an array of numbers"),
        (lambda: random_spread(-1), f"expected n as {WHOLE} -1"),
        (lambda: random_spread("2"), f"expected n as {WHOLE} '2'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_of_a_null(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
