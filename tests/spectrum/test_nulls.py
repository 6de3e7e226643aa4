"""Nulls of the spectrum against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phaselens.spectrum import gaussian_max_ratio, random_rows
from tests.spectrum.reference import dense


@pytest.mark.parametrize("case", ["equal", "wide", "tall", "spike", "two spikes", "uneven", "short"])
def test_random_rows_agree_with_simulation(case: str) -> None:
    rng = np.random.default_rng(1)
    norms, d = {
        "equal": (np.ones(128), 128),
        "wide": (np.ones(48), 160),
        "tall": (np.ones(300), 64),
        "spike": (np.r_[100.0, np.ones(199)], 96),
        "two spikes": (np.r_[30.0, 28.0, rng.uniform(0.5, 2.0, 198)], 96),
        "uneven": (np.exp(rng.normal(size=300)), 96),
        "short": (np.ones(12), 300),
    }[case]
    entropies, anisotropies = [], []
    for _ in range(4):
        rows = rng.standard_normal((len(norms), d))
        rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
        entropy, anisotropy = dense(torch.from_numpy(rows))
        entropies.append(entropy)
        anisotropies.append(anisotropy)
    null = random_rows(norms, d)
    assert null.entropy == pytest.approx(np.mean(entropies), abs=0.02)
    assert null.anisotropy == pytest.approx(np.mean(anisotropies), rel=0.12)


@pytest.mark.parametrize("n_large", [2, 3, 6, 12, 16])
@pytest.mark.parametrize("ratio", [1.0, 1.01])
def test_several_large_rows_agree_with_simulation(n_large: int, ratio: float) -> None:
    """Rows of nearly the same norm, of which each adds to the leading direction."""
    rng = np.random.default_rng(3)
    norms, d = np.r_[20 * ratio ** np.arange(n_large), np.ones(60)], 128
    shares = []
    for _ in range(100):
        rows = rng.standard_normal((len(norms), d))
        rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
        energies = np.linalg.eigvalsh(rows @ rows.T)
        shares.append(energies[-1] / energies.sum())
    assert random_rows(norms, d).anisotropy == pytest.approx(np.mean(shares), rel=0.02)


def test_the_gaussian_maximum_agrees_with_simulation() -> None:
    z = np.abs(np.random.default_rng(2).standard_normal((4000, 200)))
    assert gaussian_max_ratio(200) == pytest.approx(z.max(1).mean() / 0.67449, rel=0.01)
