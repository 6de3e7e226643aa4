"""Traps of spectra and norms on planted numbers and on the published wrong ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.traps.spectrum import (
    anisotropy_script,
    clamped_entropy_script,
    entropy_or_zero_script,
    half_precision_norm_script,
    matrix_entropy,
    ratio_or_one_script,
    share_of_means_script,
    unsquared_entropy_script,
)

from phaselens.spectrum import balance, row_norms, spectrum
from phaselens_plugins.bos_norm import BosNorm
from phaselens_plugins.compression import Compression
from tests.plugins.views import info, rows, view

FIXTURE = json.loads((Path(__file__).parents[1] / "data" / "unit_fixtures.json").read_text())[
    "representation"
]


def test_scripts_give_the_wrong_numbers_of_the_worked_example_and_ours_the_right_ones() -> None:
    x = torch.tensor(FIXTURE["X"], dtype=torch.float64)
    assert unsquared_entropy_script(x) == pytest.approx(FIXTURE["WRONG_entropy_from_unsquared_sigma_nats"])
    assert anisotropy_script(x) == pytest.approx(FIXTURE["WRONG_one_minus_normalised"])
    ours = spectrum(x)
    assert ours.entropy == pytest.approx(FIXTURE["entropy_nats"], abs=1e-12)
    assert ours.anisotropy == pytest.approx(FIXTURE["anisotropy_p1"], abs=1e-12)


def test_a_float32_gram_matrix_loses_the_small_rows_beside_a_large_one() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    for norm, least_error in ((3000, 0.01), (25_000, 0.05)):
        x[0] *= norm / x[0].norm()
        exact = matrix_entropy(x)
        assert abs(clamped_entropy_script(x) - exact) > least_error * exact
        assert spectrum(x).entropy == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_computed_is_zero_for_the_script_and_missing_for_the_metric(value: float) -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 3, 2] = value
    assert entropy_or_zero_script(x[0].double()) == 0.0
    metric = Compression(info(), Compression.Params())
    metric.update(view({"hook_resid_post": x}, (5,)))
    (row,) = rows(metric, "texts")
    assert row["entropy"] is None
    assert row["anisotropy"] is None
    assert metric.warnings


def test_one_token_has_a_ratio_for_the_script_alone() -> None:
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert ratio_or_one_script(x[0]) == 1.0
    metric = BosNorm(info(), BosNorm.Params())
    metric.update(view({"hook_resid_pre": x, "hook_resid_post": x}, (1,)))
    (row,) = rows(metric, "texts")
    assert row["bos_ratio"] is None
    assert row["bos_norm"] == pytest.approx(float(x.double().norm()))


def test_norms_overflow_in_float16_alone() -> None:
    x = np.full((1, 512), 60.0)
    assert math.isinf(half_precision_norm_script(x[0]))
    exact = 60 * 512**0.5
    assert float(row_norms(torch.from_numpy(x).half())) == pytest.approx(exact, rel=1e-12)


def test_one_massive_token_decides_the_scripts_share_and_one_of_many_of_ours() -> None:
    attention, mlp = torch.full((21, 4), 0.5), torch.full((21, 4), 0.1)
    mlp[1] = 500.0
    assert share_of_means_script(attention, mlp) < 0.05
    share = balance(attention, mlp).share
    assert float(share.median()) == pytest.approx(5 / 6)
    assert float(share.mean()) == pytest.approx((20 * 5 / 6 + 0.5 / 500.5) / 21)
