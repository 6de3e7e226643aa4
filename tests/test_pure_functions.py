"""Spectra, nulls, writes, pairings and diagonals: against dense float64, closed forms and simulation."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens.attention import (
    attend,
    distance_mass,
    explicit,
    gaussian_massive_share,
    head_norms,
    norm_matrix,
    pair_norms,
    triangular,
)
from phaselens.spectrum import (
    compression_bound,
    continuity_bound,
    gaussian_max_ratio,
    massive_activations,
    massive_rows,
    median,
    random_rows,
    require_bound,
    spectra,
    spectrum,
)

MODULES = (
    "spectrum._bound",
    "spectrum._entropy",
    "spectrum._nulls",
    "spectrum._rows",
    "attention._cells",
    "attention._writes",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"phaselens.{name}"))
    assert tried
    assert not failed


def dense(x: torch.Tensor) -> tuple[float, float]:
    """(entropy, p1) from all singular values in float64."""
    p = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum()), float(p.max())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 30.0, 3000.0, 1e5]),
)  # fmt: skip
def test_spectra_of_any_shape_and_spike(n_pos: int, d_model: int, seed: int, gain: float) -> None:
    """Within the error that is reported beside them, with and without the spiked row."""
    x = torch.randn(n_pos, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row = seed % n_pos
    x[row] *= gain
    left_out = torch.zeros(n_pos, dtype=torch.bool)
    left_out[row] = True
    for found, rows in zip(spectra(x, left_out), (x, x[~left_out]), strict=True):
        entropy, first = dense(rows)
        assert abs(found.entropy - entropy) <= found.error + 1e-13
        assert found.anisotropy == pytest.approx(first, rel=1e-8)
        assert found.error < 1e-3
    require_bound(spectrum(x), compression_bound(x))


def test_closed_forms_of_the_spectrum() -> None:
    one = torch.outer(torch.rand(7) + 0.1, torch.rand(5))
    assert spectrum(one).entropy == pytest.approx(0.0, abs=1e-6), "rank 1 but for float32's own rounding"
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
    assert gaps[-1] < 1e-3 * gaps[0], "tight as one row grows"


def test_continuity_bound_covers_every_pair_of_distributions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 12))
        p, q = rng.dirichlet(np.ones(n) * 0.5), rng.dirichlet(np.ones(n) * 0.5)
        mixed = p + (q - p) * 10.0 ** -rng.integers(0, 7)
        entropies = [-(each[each > 0] * np.log(each[each > 0])).sum() for each in (p, mixed)]
        assert abs(entropies[0] - entropies[1]) <= continuity_bound(0.5 * abs(p - mixed).sum(), n) + 1e-12


@pytest.mark.parametrize("case", ["equal", "wide", "tall", "spike", "two spikes", "uneven"])
def test_random_rows_agree_with_simulation(case: str) -> None:
    rng = np.random.default_rng(1)
    norms, d = {
        "equal": (np.ones(128), 128),
        "wide": (np.ones(48), 160),
        "tall": (np.ones(300), 64),
        "spike": (np.r_[100.0, np.ones(199)], 96),
        "two spikes": (np.r_[30.0, 28.0, rng.uniform(0.5, 2.0, 198)], 96),
        "uneven": (np.exp(rng.normal(size=300)), 96),
    }[case]
    entropies, firsts = [], []
    for _ in range(4):
        rows = rng.standard_normal((len(norms), d))
        rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
        entropy, first = dense(torch.from_numpy(rows))
        entropies.append(entropy)
        firsts.append(first)
    found = random_rows(norms, d)
    assert found.entropy == pytest.approx(np.mean(entropies), abs=0.02)
    assert found.first == pytest.approx(np.mean(firsts), rel=0.12)


def test_gaussian_nulls_agree_with_simulation() -> None:
    rng = np.random.default_rng(2)
    z = np.abs(rng.standard_normal((4000, 200)))
    assert gaussian_max_ratio(200) == pytest.approx(z.max(1).mean() / 0.67449, rel=0.01)
    norms = np.sqrt((rng.standard_normal((200000, 3)) ** 2).sum(1))
    assert gaussian_massive_share(3, 1.5) == pytest.approx((norms > 1.5 * norms.mean()).mean(), rel=0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.integers(0, 99))
def test_median(n: int, seed: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    assert median(values) == pytest.approx(float(np.median(values.double().numpy())), rel=1e-6)


def test_median_of_many() -> None:
    """Ties, infinities and every order of the values included; and one that misleads whoever looks at each 250th."""
    generator = torch.Generator().manual_seed(0)
    misleading = torch.randn(500_000, generator=generator)
    misleading[::250] += 50
    endless = torch.randn(500_001, generator=generator)
    endless[:1000], endless[-3000:] = -torch.inf, torch.inf
    for values in (
        torch.randn(500_000, generator=generator),
        misleading,
        endless,
        torch.arange(400_001.0) % 7,
        torch.cat([torch.zeros(300_000), torch.ones(200_000)]),
        torch.arange(512_000.0).view(-1, 1000).T.reshape(-1),
    ):
        assert median(values) == float(np.median(values.double().numpy()))


def test_massive_rows_and_activations_in_half_precision() -> None:
    x = torch.ones(6, 4, dtype=torch.float16)
    x[2, 1] = -60000.0
    found = massive_activations(x, n=30)
    assert (found.values[0], found.positions[0], found.dimensions[0]) == (-60000.0, 2, 1)
    assert found.n_massive == 1
    assert len(found.values) == 24
    norms = torch.tensor([40.0, 1.0, 1.0, 12.0, 1.0])
    assert massive_rows(norms).tolist() == [True, False, False, True, False]
    assert not massive_rows(torch.zeros(4)).any()


@pytest.mark.parametrize(
    "pairs", [[(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3)], [(5, 2)]]
)
def test_a_rotation_keeps_the_norms_of_the_pairs_that_it_mixes(pairs: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 2, 8, generator=generator, dtype=torch.float64)
    turned = states.clone()
    for first, second in pairs:
        angle = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 6
        turned[..., first] = states[..., first] * angle.cos() - states[..., second] * angle.sin()
        turned[..., second] = states[..., first] * angle.sin() + states[..., second] * angle.cos()
    before, after = norm_matrix(states), norm_matrix(turned)
    assert pair_norms(before, pairs).shape == (2, len(pairs))
    torch.testing.assert_close(pair_norms(before, pairs), pair_norms(after, pairs), atol=1e-12, rtol=1e-12)
    first, second = pairs[0]
    expected = states[..., [first, second]].square().sum((0, 2)).sqrt()
    torch.testing.assert_close(pair_norms(before, pairs)[:, 0], expected, atol=1e-12, rtol=1e-12)
    assert pair_norms(before, []).shape == (2, 0)


@pytest.mark.parametrize(
    ("gain", "window", "softcap"), [(1, None, None), (1, 7, 5.0), (200, None, None), (200, 7, 20.0)]
)
def test_mass_near_the_diagonal(gain: float, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 150, 16) * gain, torch.randn(2, 2, 150, 16)
    options = {"scale": 0.25, "window": window, "softcap": softcap}
    _, lse = attend(q, k, k, **options)
    pattern = explicit(q.double(), k.double(), k.double(), **options)[2]
    lengths = torch.tensor([150, 40])
    found = distance_mass(q, k, lse, longest=70, lengths=lengths, **options)
    for row, n in enumerate(lengths.tolist()):
        for distance in range(70):
            real = pattern[row, :, :n, :n]
            want = real.diagonal(-distance, 1, 2).sum(-1) if distance < n else torch.zeros(4)
            assert torch.allclose(found[row, :, distance].double(), want.double(), atol=1e-5 * n)


def test_norms_through_the_triangular_factor() -> None:
    torch.manual_seed(0)
    for d_head, d_model in ((4, 16), (16, 4)):
        w_o, z = torch.randn(3, d_head, d_model), torch.randn(9, 3, d_head)
        want = torch.einsum("phd,hdm->phm", z.double(), w_o.double()).norm(dim=-1)
        assert torch.allclose(head_norms(z, triangular(w_o)), want, rtol=1e-5)
