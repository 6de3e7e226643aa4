"""Selection of cells by their norms: hand-made examples, and properties for any norms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens_plugins._recipes import (
    MATCH_TOLERANCE,
    RECIPES,
    SelectionRule,
    largest_if_massive,
    massive,
    matched,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 8))


def squares(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Return heavy-tailed M² [head, d_head]."""
    return np.exp(2 * np.random.default_rng(seed).standard_normal(shape))


def draw(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).random(shape)


def test_massive_cells_exceed_the_mean_of_all_cells_or_of_their_head() -> None:
    norms = np.array([[5.0, 0.0, 1.0, 1.0], [20.0, 20.0, 20.0, 20.0]])
    over_all = massive(norms**2, norms, SelectionRule(1.5, "global"))
    over_head = massive(norms**2, norms, SelectionRule(1.5, "per_head"))
    assert over_all.tolist() == [[False] * 4, [True] * 4]
    assert over_head.tolist() == [[True, False, False, False], [False] * 4]
    # The study compares a head's largest cell with its head's mean, whatever the mean of the rule is.
    assert largest_if_massive(norms**2, norms, SelectionRule(1.5, "global")).tolist() == over_head.tolist()


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999), multiple=st.floats(0.5, 4))
def test_controls_have_as_many_cells_and_none_that_is_treated(
    shape: tuple[int, int], seed: int, multiple: float
) -> None:
    sizes, rule = squares(shape, seed), SelectionRule(multiple)
    treated = massive(sizes, sizes, rule)
    for name in ("random-count", "random-norm"):
        control = RECIPES[name].select(sizes, draw(shape, seed), rule)
        assert not (control & treated).any()
        if name == "random-count":
            assert control.sum() == min(treated.sum(), (~treated).sum())
    assert RECIPES["random-any"].select(sizes, draw(shape, seed), rule).sum() == treated.sum()
    top = RECIPES["top-1"].select(sizes, sizes, rule)
    for name in ("smallest", "top-1-random"):
        control = RECIPES[name].select(sizes, draw(shape, seed), rule)
        assert control.sum(-1).tolist() == [1] * shape[0]
        assert not (control & top).any()
    assert (sizes[RECIPES["smallest"].select(sizes, sizes, rule)] == sizes.min(-1)).all()
    assert (sizes[top] == sizes.max(-1)).all()


def test_random_any_sometimes_selects_a_massive_cell() -> None:
    """The study's control draws from all cells; the default one must not."""
    sizes = np.array([[100.0, 1.0, 1.0, 1.0]] * 2)
    hits = {
        name: sum(
            int(sizes[RECIPES[name].select(sizes, draw((2, 4), seed), SelectionRule(2.0))].max() > 1)
            for seed in range(50)
        )
        for name in ("random-any", "random-count")
    }
    assert hits["random-any"] > 5
    assert hits["random-count"] == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n_treated=st.integers(1, 3))
def test_no_single_step_improves_a_matched_sum(seed: int, n_treated: int) -> None:
    """Unless the sum is within tolerance, adding, dropping or exchanging one cell does not bring it nearer."""
    sizes = squares((3, 6), seed)
    treated = np.zeros(18, bool)
    treated[np.argsort(sizes.reshape(-1))[-n_treated:]] = True
    treated = treated.reshape(3, 6)
    cells = matched(sizes, treated, draw((3, 6), seed))
    target, free_sizes = sizes[treated].sum(), sizes[~treated & ~cells]
    gap = abs(target - sizes[cells].sum())
    assert not (cells & treated).any()
    if gap > MATCH_TOLERANCE * target:
        for decrease in (0.0, *sizes[cells]):
            for increase in (0.0, *free_sizes):
                assert abs(target - sizes[cells].sum() + decrease - increase) >= gap * (1 - 1e-9)


def test_a_sum_within_reach_of_other_cells_is_matched() -> None:
    sizes = np.abs(np.random.default_rng(0).standard_normal((8, 32)))
    sizes[0, 0] = 40.0
    treated = sizes == 40.0
    selections = [matched(sizes, treated, draw((8, 32), seed)) for seed in range(5)]
    assert all(abs(sizes[cells].sum() / 40.0 - 1) <= MATCH_TOLERANCE for cells in selections)
    assert len({cells.tobytes() for cells in selections}) == 5


@pytest.mark.parametrize("tensor", ["q", "k"])
def test_norms_of_a_large_model_are_matched(tensor: str) -> None:
    """Llama-2-7B-chat, one layer: 4096 cells, of which 48 queries' and 49 keys' are massive."""
    stored = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "jin_qkv_llama2.json").read_text())
    sizes, rule = np.array(stored[f"M_{tensor}"]) ** 2, SelectionRule()
    treated = massive(sizes, sizes, rule)
    assert treated.sum() == stored["massive"][f"{tensor}_post"]["count_lambda5_global"]
    for seed in range(2):
        control = RECIPES["random-norm"].select(sizes, draw(sizes.shape, seed), rule)
        assert not (control & treated).any()
        assert abs(sizes[control].sum() / sizes[treated].sum() - 1) <= MATCH_TOLERANCE
        assert control.sum() > 5 * treated.sum()


def test_a_sum_of_zero_is_matched_by_no_cells() -> None:
    sizes = np.ones((2, 4))
    assert not matched(sizes, np.zeros((2, 4), bool), sizes).any()
    sizes[0, 0] = 0.0
    assert not matched(sizes, sizes == 0, np.ones((2, 4))).any()


def test_a_control_of_heads_that_are_copies_of_each_other_is_found_in_a_few_steps() -> None:
    """Cells that differ by rounding alone offer an endless number of exchanges that gain nothing."""
    one_head = np.linspace(1.0, 1.8, 8)
    copies = np.stack([one_head * (1 + step * 1e-13) for step in range(64)])
    treated = np.zeros(copies.shape, dtype=bool)
    treated[:, -1] = True
    treated[0, :4] = True
    selected = matched(copies, treated, draw(copies.shape, 0))
    assert not (selected & treated).any()
