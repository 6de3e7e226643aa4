"""Norms of the writes of heads against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.attention import _writes, head_norms, scaled_writes, triangular, writes
from phaselens.errors import InputError

N_HEADS, N_QUERIES, D_HEAD = 3, 11, 4
W_O, MASS = torch.ones(N_HEADS, D_HEAD, 7), torch.ones(N_HEADS, N_QUERIES)
VALUE, VALUES = torch.ones(N_HEADS, D_HEAD), torch.ones(N_QUERIES, N_HEADS, D_HEAD)
Z, FACTOR = torch.ones(5, N_HEADS, D_HEAD), torch.ones(N_HEADS, 2, D_HEAD)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(mass: Tensor, values: Tensor, w_o: Tensor) -> Tensor:
    """What each head writes at each query, [query, head, d_model], float64."""
    weighed = mass.double().T[..., None] * values.double()
    return torch.einsum("qhd,hdm->qhm", weighed, w_o.double())


def test_norms_from_the_triangular_factor_equal_float64() -> None:
    torch.manual_seed(0)
    for d_head, d_model in ((4, 16), (16, 4)):
        w_o, z = torch.randn(3, d_head, d_model), torch.randn(9, 3, d_head)
        expected = torch.einsum("phd,hdm->phm", z.double(), w_o.double()).norm(dim=-1)
        assert torch.allclose(head_norms(z, triangular(w_o)), expected, rtol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2, 5, 9, 256])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_norms_do_not_depend_on_the_block_of_tokens(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, dtype: torch.dtype, rtol: float
) -> None:
    monkeypatch.setattr(_writes, "_ROWS", n_rows)
    w_o, z = draw(3, 4, 7), draw(9, 3, 4, seed=1).to(dtype)
    expected = torch.einsum("phd,hdm->phm", z.double(), w_o).norm(dim=-1)
    norms = head_norms(z, triangular(w_o))
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, expected, rtol=rtol, atol=0)


def test_squares_beyond_float32_have_norms() -> None:
    w_o, z = draw(3, 4, 7), draw(9, 3, 4, seed=1).float()
    torch.testing.assert_close(
        head_norms(z * 2.0**100, triangular(w_o)),
        head_norms(z, triangular(w_o)) * 2.0**100,
        rtol=1e-6,
        atol=0,
    )


def test_no_token_has_no_norm() -> None:
    assert head_norms(torch.zeros(0, N_HEADS, D_HEAD), FACTOR).shape == (0, N_HEADS)


@pytest.mark.parametrize("d_model", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_writes_of_one_key_equal_dense(d_model: int, dtype: torch.dtype) -> None:
    mass = draw(N_HEADS, N_QUERIES, seed=1).abs().to(dtype)
    value, w_o = draw(N_HEADS, D_HEAD, seed=2).to(dtype), draw(N_HEADS, D_HEAD, d_model).to(dtype)
    written = dense(mass, value.expand(N_QUERIES, -1, -1), w_o)
    full = dense(torch.ones(N_HEADS, 1), value[None], w_o)[0]
    result = writes(mass, value, w_o)
    for name, expected in {
        "heads": written.norm(dim=-1).mean(0),
        "layer": written.sum(1).norm(dim=-1).mean(),
        "value_writes": full.norm(dim=-1),
        "layer_value_write": full.sum(0).norm(),
    }.items():
        torch.testing.assert_close(getattr(result, name), expected, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("d_model", [2, 3, 7])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-12)])
def test_scaled_writes_equal_dense(d_model: int, dtype: torch.dtype, rtol: float) -> None:
    mass = draw(N_HEADS, N_QUERIES, seed=1).abs().to(dtype)
    values = draw(N_QUERIES, N_HEADS, D_HEAD, seed=2).to(dtype)
    w_o = draw(N_HEADS, D_HEAD, d_model).to(dtype)
    written = dense(mass, values, w_o)
    heads, layer = scaled_writes(mass, values, w_o, triangular(w_o))
    torch.testing.assert_close(heads, written.norm(dim=-1).mean(0), rtol=rtol, atol=0)
    torch.testing.assert_close(layer, written.sum(1).norm(dim=-1).mean(), rtol=rtol, atol=0)


def test_a_key_without_attention_writes_nothing_whatever_its_factors() -> None:
    mass, values, w_o = (
        draw(N_HEADS, N_QUERIES, seed=1).abs(),
        draw(N_QUERIES, N_HEADS, D_HEAD),
        draw(3, 4, 7),
    )
    mass[1, 4], mass[2, 0] = 0.0, 1e-30
    expected = scaled_writes(mass, values, w_o, triangular(w_o))
    values[4, 1] = torch.inf
    result = scaled_writes(mass, values, w_o, triangular(w_o))
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    values[0, 2] = torch.inf
    assert scaled_writes(mass, values, w_o, triangular(w_o))[0].isfinite().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (writes, (MASS[:2], VALUE, W_O), r"mass of shape \(3, 11\), received \(2, 11\)"),
        (writes, (MASS, VALUE[:2], W_O), r"value of shape \(3, 4\), received \(2, 4\)"),
        (writes, (MASS, VALUE[:, :3], W_O), r"value of shape \(3, 4\), received \(3, 3\)"),
        (scaled_writes, (MASS[:2], VALUES, W_O, FACTOR), r"mass of shape \(3, 11\), received \(2, 11\)"),
        (scaled_writes, (MASS, VALUES[1:], W_O, FACTOR), r"values of shape \(11, 3, 4\), received \(10, 3, 4\)"),
        (scaled_writes, (MASS, VALUES[:, 1:], W_O, FACTOR), r"values of shape \(11, 3, 4\), received \(11, 2, 4\)"),
        (scaled_writes, (MASS, VALUES, W_O[:, 1:], FACTOR), r"values of shape \(11, 3, 3\), received \(11, 3, 4\)"),
        (head_norms, (Z[:, 1:], FACTOR), r"factor of shape \(2, 2, 4\), received \(3, 2, 4\)"),
        (head_norms, (Z[..., 1:], FACTOR), r"factor of shape \(3, 2, 3\), received \(3, 2, 4\)"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(
    function: Any, arguments: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(InputError, match=f"^expected {message}$"):
        function(*arguments)
