"""Statistics of rows at their limits: no row, one row, zero rows, exact thresholds, many rows, other types."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from phaselens.errors import InputError
from phaselens.spectrum import (
    _rows,
    balance,
    bos_norm,
    massive_activations,
    massive_coordinates,
    massive_rows,
    median,
    row_cosines,
    row_norms,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [64, 65])
@pytest.mark.parametrize("n_equal", [1, 2, 3])
def test_the_median_is_exact_wherever_the_sample_lies(
    n: int, n_equal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is the first value alone, which takes every rank once."""
    monkeypatch.setattr(_rows, "_SAMPLE", 1)
    for rank in range(n - n_equal + 1):
        values = torch.arange(float(n))
        values[rank : rank + n_equal] = rank
        values = values.roll(-rank)
        assert median(values) == float(np.median(values.numpy()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_the_median_of_other_types_is_exact(dtype: torch.dtype) -> None:
    for n in (3, 4):
        values = gaussian(n, n).mul(3).abs().to(dtype)
        assert median(values) == float(np.median(values.double().numpy()))
    assert median(torch.tensor([2**24 + 1])) == 2**24 + 1, "float32 has no such number"
    assert median(torch.tensor([2.0, 1.0, 4.0], requires_grad=True)) == 2


def test_norms_of_tensors_of_any_number_of_axes() -> None:
    x = gaussian(4, 300, 5)
    norms = (x.double() ** 2).sum(-1).sqrt()
    for rows, expected in ((x, norms), (x[0], norms[0]), (x[0, 0], norms[0, 0]), (x[:0], norms[:0])):
        torch.testing.assert_close(row_norms(rows), expected, rtol=1e-12, atol=0)


def test_statistics_of_rows_do_not_depend_on_how_many_are_widened_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, other = gaussian(7, 3), gaussian(7, 3, seed=1)
    expected = row_norms(x), row_cosines(x, x[3]), *balance(x, other)
    monkeypatch.setattr(_rows, "CACHED_ROWS", 2)
    monkeypatch.setattr(_rows, "_CACHED_NUMBERS", 7)
    measured = row_norms(x), row_cosines(x, x[3]), *balance(x, other)
    torch.testing.assert_close(measured, expected, rtol=1e-14, atol=0)


def test_balance_equals_dense_numpy() -> None:
    a, m = gaussian(6, 4) * 1e-3, gaussian(6, 4, seed=1) * 1e-3
    m[2] = -a[2]
    a[4] = m[5] = 0.0
    m[4] = 0.0
    result = balance(a, m)
    wide_a, wide_m = a.double().numpy(), m.double().numpy()
    norms_a, norms_m = np.linalg.norm(wide_a, axis=1), np.linalg.norm(wide_m, axis=1)
    change = wide_a + wide_m
    with np.errstate(invalid="ignore"):
        expected = {
            "attn": norms_a,
            "mlp": norms_m,
            "share": norms_a / (norms_a + norms_m),
            "projection": (wide_a * change).sum(1) / (change**2).sum(1),
            "unaligned": norms_a**2 / (norms_a**2 + norms_m**2),
        }
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(result, name).numpy(), values, rtol=1e-10, atol=1e-15, err_msg=name
        )


def test_the_first_row_beside_no_other_row_or_zero_rows() -> None:
    assert all(math.isnan(value) for value in bos_norm(torch.zeros(0)))
    norm, *ratios = bos_norm(torch.tensor([3.0]))
    assert norm == 3
    assert all(math.isnan(value) for value in ratios)
    norm, ratio, ratio_median, *others = bos_norm(torch.tensor([3.0, 0.0]))
    assert (norm, *others) == (3, 0, 0)
    assert math.isnan(ratio)
    assert math.isnan(ratio_median)
    assert bos_norm(torch.tensor([3.0, 2.0])) == (3, 1.5, 1.5, 2, 2)
    assert bos_norm(torch.tensor([6, 1, 2, 6])) == (6, 2, 3, 3, 2)


def test_a_row_of_exactly_ten_medians_is_massive() -> None:
    assert massive_rows(torch.tensor([20.0, 2.0, 2.0, 19.9, 2.0])).tolist() == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert massive_rows(torch.tensor([4.0, 2.0, 2.0]), factor=0).all()
    for norms in (torch.zeros(3), torch.tensor([1.0, torch.nan, 5.0]), torch.zeros(0)):
        mask = massive_rows(norms)
        assert mask.dtype == torch.bool
        assert not mask.any()


@pytest.mark.parametrize(
    ("value", "fill", "is_massive"),
    [
        (100.0, 0.05, False),
        (100.5, 0.05, True),
        (1000.0, 1.0, True),
        (999.0, 1.0, False),
        (-1000.0, 1.0, True),
    ],
)
def test_the_criterion_of_massive_activations_at_its_limits(
    value: float, fill: float, is_massive: bool
) -> None:
    """|a| must be above 100, and at least 1000 times the median."""
    x = torch.full((3, 5), fill)
    x[1, 4] = value
    assert massive_coordinates(x).nonzero().tolist() == ([[1, 4]] if is_massive else [])
    activations = massive_activations(x)
    assert activations.n_massive == int(is_massive)
    assert len(activations.values) == 3
    assert (activations.positions[0], activations.dimensions[0]) == (1, 4)


def test_a_criterion_of_zero_holds_for_all_values_but_zero() -> None:
    x = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
    assert massive_activations(x, threshold=0, ratio=0).n_massive == 3
    assert massive_coordinates(x, threshold=0, ratio=0).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.tensor([[1.0, torch.inf]] * 3),
        torch.tensor([[torch.nan, 1e6]]),
    ],
)
def test_without_finite_values_there_are_no_coordinates(x: torch.Tensor) -> None:
    activations = massive_activations(x)
    assert (activations.values, activations.positions, activations.dimensions) == ([], [], [])
    assert activations.n_massive == 0
    assert math.isnan(activations.median)
    mask = massive_coordinates(x)
    assert mask.dtype == torch.bool
    assert not mask.any()


def test_a_median_of_zero_has_no_ratio() -> None:
    x = torch.zeros(3, 3)
    x[0, 0] = 500.0
    activations = massive_activations(x)
    assert math.isnan(activations.ratio)
    assert activations.n_massive == 1


X = torch.ones(2, 3)
MATRIX, NUMBER = r"a tensor \[pos, d_model\], received a", "a number of at least 0, received -1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_cosines([1.0], X[0]), f"expected x as {MATRIX} list"),
        (lambda: row_cosines(X, X), r"expected row as a tensor \[d_model\], received one of shape \(2, 3\)"),
        (lambda: median([1.0]), "expected values as a tensor, received list"),
        (lambda: massive_rows(X), r"expected norms as a tensor \[pos\], received one of shape \(2, 3\)"),
        (lambda: massive_rows(X[0], -1), f"expected factor as {NUMBER}"),
        (lambda: massive_activations(X[0]), f"expected x as {MATRIX} tensor"),
        (lambda: massive_activations(X, threshold=-1), f"expected threshold as {NUMBER}"),
        (lambda: massive_activations(X, ratio=-1), f"expected ratio as {NUMBER}"),
        (lambda: massive_coordinates(X[0]), f"expected x as {MATRIX} tensor"),
        (lambda: massive_coordinates(X, threshold=-1), f"expected threshold as {NUMBER}"),
        (lambda: massive_coordinates(X, ratio=-1), f"expected ratio as {NUMBER}"),
        (lambda: balance(X[0], X), f"expected attn_out as {MATRIX} tensor"),
        (lambda: balance(X, X[0]), f"expected mlp_out as {MATRIX} tensor"),
        (lambda: balance(X, X[:1]), r"received \(2, 3\) and \(1, 3\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_of_rows(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
