"""Massive cells and norms of pairs against rotations, simulation and published tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.attention import gaussian_massive_share, massive_cells, norm_matrix, pair_norms
from phaselens.errors import InputError

DATA = Path(__file__).parents[1] / "data"
GOLDENS = DATA / "goldens"
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())


def test_the_share_of_gaussian_massive_cells_agrees_with_simulation() -> None:
    rng = np.random.default_rng(2)
    norms = np.sqrt((rng.standard_normal((200000, 3)) ** 2).sum(1))
    assert gaussian_massive_share(3, 1.5) == pytest.approx((norms > 1.5 * norms.mean()).mean(), rel=0.05)


@pytest.mark.parametrize(
    "pairs", [[(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3)], [(5, 2)]]
)
def test_a_rotation_keeps_the_norms_of_the_pairs_that_it_mixes(pairs: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 2, 8, generator=generator, dtype=torch.float64)
    turned = states.clone()
    for dim_a, dim_b in pairs:
        angle = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 6
        turned[..., dim_a] = states[..., dim_a] * angle.cos() - states[..., dim_b] * angle.sin()
        turned[..., dim_b] = states[..., dim_a] * angle.sin() + states[..., dim_b] * angle.cos()
    norms, turned_norms = norm_matrix(states), norm_matrix(turned)
    assert pair_norms(norms, pairs).shape == (2, len(pairs))
    torch.testing.assert_close(
        pair_norms(norms, pairs), pair_norms(turned_norms, pairs), atol=1e-12, rtol=1e-12
    )
    dim_a, dim_b = pairs[0]
    expected = states[..., [dim_a, dim_b]].square().sum((0, 2)).sqrt()
    torch.testing.assert_close(pair_norms(norms, pairs)[:, 0], expected, atol=1e-12, rtol=1e-12)
    assert pair_norms(norms, []).shape == (2, 0)


@pytest.mark.parametrize(("tensor", "name"), [("q", "q_post"), ("k", "k_post"), ("v", "v")])
def test_massive_values_of_published_tensors(tensor: str, name: str) -> None:
    stored: dict[str, Any] = json.loads((GOLDENS / "jin_qkv_llama2.json").read_text())
    norms, expected = torch.tensor(stored[f"M_{tensor}"], dtype=torch.float64), stored["massive"][name]
    cells = massive_cells(norms)
    assert cells.nonzero().tolist() == expected["positions_global"]
    assert int(cells.sum()) == expected["count_lambda5_global"]
    assert int(massive_cells(norms, 5.0, "per_head").sum()) == expected["count_lambda5_per_head"]
    assert float(norms.mean()) == pytest.approx(expected["mean"], rel=1e-4)
    assert math.isclose(float(norms.max()), expected["max"], rel_tol=1e-4)


def test_massive_values_of_the_fixture() -> None:
    expected = FIXTURES["massive_values"]
    norms = norm_matrix(torch.tensor(expected["Q"], dtype=torch.float64))
    assert norms.tolist() == expected["M"]
    assert int(massive_cells(norms, expected["lam"]).sum()) == expected["count_global"]
    assert int(massive_cells(norms, expected["lam"], "per_head").sum()) == expected["count_per_head"]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 50])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_norms_of_any_number_of_tokens_equal_float64(n: int, dtype: torch.dtype, rtol: float) -> None:
    states = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = norm_matrix(states)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, states.double().square().sum(0).sqrt(), rtol=rtol, atol=0)


def test_norms_of_many_tokens_keep_their_digits_and_do_not_overflow() -> None:
    """A sum of 100,000 equal squares in float32 alone would lose three digits."""
    norms = norm_matrix(torch.full((100_000, 1, 1), 0.1))
    assert float(norms) == pytest.approx(math.sqrt(100_000) * float(torch.tensor(0.1)), rel=2e-7)
    assert float(norm_matrix(torch.full((4, 1, 1), 6e4, dtype=torch.float16))) == pytest.approx(
        1.2e5, rel=1e-3
    )


@pytest.mark.parametrize("tokens", [(0, 16), (0, 33), (32, 33)])
def test_sums_of_groups_of_tokens_are_in_float64(tokens: tuple[int, int]) -> None:
    """2²⁴ + 1 is not a float32 number."""
    states = torch.zeros(40, 1, 1)
    states[tokens[0]], states[tokens[1]] = 4096.0, 1.0
    assert float(norm_matrix(states)) == math.sqrt(2**24 + 1)


def test_a_cell_is_massive_beyond_the_multiple_and_not_at_it() -> None:
    norms = torch.tensor([[1.0, 3.0, 2.0], [6.0, 6.0, 6.0]])  # means 4, 2 and 6
    assert massive_cells(norms, 1.5).tolist() == [[False] * 3, [False] * 3]
    assert massive_cells(norms, 1.4999).tolist() == [[False] * 3, [True] * 3]
    assert massive_cells(norms, 1.5, "per_head").tolist() == [[False] * 3, [False] * 3]
    assert massive_cells(norms, 1.0, "per_head").tolist() == [[False, True, False], [False] * 3]
    assert massive_cells(norms, 0, "per_head").all()
    assert massive_cells(torch.tensor([[1.0] * 9 + [11.0]])).tolist() == [[False] * 9 + [True]]
    assert massive_cells(torch.tensor([[1.0] * 9 + [9.0]])).tolist() == [[False] * 10]


def test_heads_and_dimensions_are_not_mixed_up() -> None:
    norms = torch.tensor([[1.0, 1.0, 10.0], [100.0, 100.0, 100.0]], dtype=torch.float64)
    assert massive_cells(norms, 2.0, "per_head").tolist() == [[False, False, True], [False] * 3]
    assert pair_norms(norms[None], ((2, 0), [1, 2])).tolist() == [
        [[math.hypot(10, 1), math.hypot(1, 10)], [pytest.approx(math.hypot(100, 100))] * 2]
    ]


@pytest.mark.parametrize(
    "pair", [(0, 3), (3, 0), (-1, 0), (0, -1), (0, 1, 2), (0,), (0, 1.0), (True, 0), "01", 3]
)
def test_a_pair_that_is_not_two_dimensions_is_named(pair: Any) -> None:
    with pytest.raises(
        InputError, match=r"^expected each of pairs as two dimensions from 0 to 2, received"
    ) as caught:
        pair_norms(torch.ones(2, 3), [(0, 2), pair])
    assert str(caught.value).endswith(f"received {pair!r}")


def test_pairs_are_a_list_and_norms_have_an_axis() -> None:
    with pytest.raises(InputError, match=r"^expected pairs as a list of pairs of dimensions, received "):
        pair_norms(torch.ones(2, 3), (pair for pair in [(0, 1)]))  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"^expected norms as a tensor \[…, d_head\], received one of shape \(\)$"
    ):
        pair_norms(torch.tensor(1.0), [])


@pytest.mark.parametrize("over", ["heads", "GLOBAL", None])
def test_a_mean_over_anything_else_is_refused(over: Any) -> None:
    with pytest.raises(InputError, match=f"^expected over as global or per_head, received {over!r}$"):
        massive_cells(torch.ones(2, 3), over=over)


def test_the_share_of_gaussian_massive_cells_has_a_closed_form_for_one_and_two_tokens() -> None:
    """The norm of one value is |x|, with a mean of √(2/π); that of two has a Rayleigh distribution."""
    for multiple in (0.5, 1.0, 2.0):
        one = math.erfc(multiple * math.sqrt(2 / math.pi) / math.sqrt(2))
        assert gaussian_massive_share(1, multiple) == pytest.approx(one, rel=1e-12)
        two = math.exp(-((multiple * math.sqrt(math.pi / 2)) ** 2) / 2)
        assert gaussian_massive_share(2, multiple) == pytest.approx(two, rel=1e-12)
    assert gaussian_massive_share(3, 0) == 1.0
    assert math.isnan(gaussian_massive_share(0, 5.0))


@pytest.mark.parametrize(("n_tokens", "multiple", "name"), [(-1, 5.0, "n_tokens"), (3, -0.1, "multiple")])
def test_negative_numbers_are_refused_by_name(n_tokens: int, multiple: float, name: str) -> None:
    with pytest.raises(InputError, match=rf"^expected {name} as a .*number of at least 0, received -"):
        gaussian_massive_share(n_tokens, multiple)
    with pytest.raises(InputError, match=r"^expected multiple as a number of at least 0, received -0.1$"):
        massive_cells(torch.ones(2, 3), -0.1)
