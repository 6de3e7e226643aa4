"""Bounds of the entropy and the anisotropy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from phaselens.spectrum import compression_bound, continuity_bound, require_bound, spectrum

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
