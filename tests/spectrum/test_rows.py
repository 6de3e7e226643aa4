"""Medians, massive rows and massive activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens.errors import InputError
from phaselens.spectrum import (
    bos_norm,
    massive_activations,
    massive_coordinates,
    massive_rows,
    median,
    row_cosines,
    row_norms,
)

DATA = Path(__file__).parents[1] / "data"
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.integers(0, 99))
def test_the_median_equals_numpys(n: int, seed: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    assert median(values) == pytest.approx(float(np.median(values.double().numpy())), rel=1e-6)


def test_the_median_of_many_values_equals_numpys() -> None:
    """Values with ties, infinities, several orders, and one for which a sample of every 250th value is misleading."""
    generator = torch.Generator().manual_seed(0)
    misleading = torch.randn(500_000, generator=generator)
    misleading[::250] += 50
    with_infinities = torch.randn(500_001, generator=generator)
    with_infinities[:1000], with_infinities[-3000:] = -torch.inf, torch.inf
    for values in (
        torch.randn(500_000, generator=generator),
        misleading,
        with_infinities,
        torch.arange(400_001.0) % 7,
        torch.cat([torch.zeros(300_000), torch.ones(200_000)]),
        torch.arange(512_000.0).view(-1, 1000).T.reshape(-1),
    ):
        assert median(values) == float(np.median(values.double().numpy()))


def test_massive_rows_and_activations_work_in_half_precision() -> None:
    x = torch.ones(6, 4, dtype=torch.float16)
    x[2, 1] = -60000.0
    activations = massive_activations(x, n=30)
    assert (activations.values[0], activations.positions[0], activations.dimensions[0]) == (-60000.0, 2, 1)
    assert activations.n_massive == 1
    assert len(activations.values) == 24
    norms = torch.tensor([40.0, 1.0, 1.0, 12.0, 1.0])
    assert massive_rows(norms).tolist() == [True, False, False, True, False]
    assert not massive_rows(torch.zeros(4)).any()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_massive_coordinates_are_those_that_are_counted(n: int, d: int, seed: int) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) ** 3
    criterion = {"threshold": 1.0, "ratio": 3.0}
    size = np.abs(x.double().numpy())
    expected = (size > 1.0) & (size >= 3.0 * np.median(size))
    mask = massive_coordinates(x, **criterion)
    assert mask.numpy().tolist() == expected.tolist()
    assert int(mask.sum()) == massive_activations(x, n=1, **criterion).n_massive


def test_no_coordinate_is_massive_where_a_value_is_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        x = torch.ones(4, 3)
        x[1, 1], x[2, 2] = value, 1e6
        assert not massive_coordinates(x).any()
    assert massive_coordinates(torch.zeros(0, 3)).shape == (0, 3)


def test_norms_of_the_fixture() -> None:
    expected = FIXTURES["representation"]
    norms = row_norms(torch.tensor(expected["X"], dtype=torch.float64))
    assert norms.tolist() == pytest.approx(expected["row_norms"])
    bos = bos_norm(norms)
    assert (bos.norm, bos.ratio) == pytest.approx((expected["bos_norm"], expected["bos_ratio"]))


def test_massive_activation_of_the_fixture() -> None:
    expected = FIXTURES["massive_activation"]
    x = torch.linspace(0.01, 0.4, 2000, dtype=torch.float64).view(1, 2000)
    x[0, 7], x[0, 9] = 767.6, 150.0
    largest = massive_activations(x)
    assert largest.median == pytest.approx(expected["median_abs"], rel=1e-12)
    assert largest.ratio == pytest.approx(expected["ratio_idx7"], rel=1e-12)
    assert abs(largest.values[1]) / largest.median == pytest.approx(expected["ratio_idx9"], rel=1e-12)
    assert largest.n_massive == 1
    assert largest.dimensions[:2] == [7, 9]


def test_cosines_of_many_rows_equal_numpys_and_those_of_zero_rows_are_missing() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    x[5] = 0.0
    wide = x.double().numpy()
    norms = np.sqrt((wide**2).sum(-1))
    with np.errstate(invalid="ignore"):
        expected = wide @ wide[3] / norms / norms[3]
    np.testing.assert_allclose(row_cosines(x, x[3]).numpy(), expected, rtol=1e-12, atol=1e-15)
    assert row_cosines(x[:2], x[5]).isnan().all()
    with pytest.raises(InputError, match="expected row of 7 entries"):
        row_cosines(x, x[0, :3])
