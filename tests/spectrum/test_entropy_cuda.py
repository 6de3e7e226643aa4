"""Statistics of rows on a GPU equal those on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from phaselens.spectrum import (
    _entropy,
    adjacency,
    balance,
    compression_bound,
    massive_activations,
    massive_coordinates,
    massive_rows,
    median,
    prefix_spread,
    rank_collapse,
    relative_change,
    row_cosines,
    row_norms,
    spectra,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = "cuda"


def rows(n_pos: int, d_model: int) -> torch.Tensor:
    x = torch.randn(n_pos, d_model, generator=torch.Generator().manual_seed(0))
    x[1] *= 30
    return x


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (300, 64), (64, 300)])
def test_spectra_on_a_gpu_equal_those_on_the_cpu(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_entropy, "CHUNK", 16)
    x = rows(*shape)
    left_out = torch.arange(len(x)) == 1
    for result, expected in zip(
        spectra(x.to(DEVICE), left_out.to(DEVICE)), spectra(x, left_out), strict=True
    ):
        assert result == pytest.approx(expected, rel=1e-10)
    assert compression_bound(x.to(DEVICE)) == pytest.approx(compression_bound(x), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_medians_on_a_gpu_equal_those_on_the_cpu(dtype: torch.dtype) -> None:
    for n in (1, 2, 3, 500, 501):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        assert median(values.to(DEVICE)) == median(values)
    assert math.isnan(median(torch.tensor([1.0, torch.nan], device=DEVICE)))


def test_statistics_of_rows_on_a_gpu_equal_those_on_the_cpu() -> None:
    x, other = rows(300, 24), rows(300, 24).flip(0)
    x_on_gpu, other_on_gpu = x.to(DEVICE), other.to(DEVICE)
    partners = torch.randint(0, 300, (299,), generator=torch.Generator().manual_seed(1))
    for result, expected in (
        (row_norms(x_on_gpu), row_norms(x)),
        (row_cosines(x_on_gpu, x_on_gpu[1]), row_cosines(x, x[1])),
        (prefix_spread(x_on_gpu), prefix_spread(x)),
        (relative_change(x_on_gpu, other_on_gpu), relative_change(x, other)),
        *zip(balance(x_on_gpu, other_on_gpu), balance(x, other), strict=True),
        (massive_rows(row_norms(x_on_gpu)), massive_rows(row_norms(x))),
        (
            massive_coordinates(x_on_gpu, threshold=9.0, ratio=20.0),
            massive_coordinates(x, threshold=9.0, ratio=20.0),
        ),
    ):
        assert result.device.type == DEVICE
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-12, atol=1e-12)
    assert massive_activations(x_on_gpu) == massive_activations(x)
    assert rank_collapse(x_on_gpu) == pytest.approx(rank_collapse(x), rel=1e-12)
    assert adjacency(x_on_gpu, partners) == adjacency(x, partners)
