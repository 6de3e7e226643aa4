"""How cells are chosen from norms: by hand, and for any norms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens_plugins._cells import Folds, Moments
from phaselens_plugins._recipes import NEAR, RECIPES, Rule, massive, matched, thresholded

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 8))


def squares(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Heavy-tailed M² [head, d_head]."""
    return np.exp(2 * np.random.default_rng(seed).standard_normal(shape))


def draw(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).random(shape)


def test_massive_is_over_the_mean_of_all_cells_or_of_the_head() -> None:
    norms = np.array([[5.0, 0.0, 1.0, 1.0], [20.0, 20.0, 20.0, 20.0]])
    over_all = massive(norms**2, norms, Rule(1.5, "global"))
    over_head = massive(norms**2, norms, Rule(1.5, "per_head"))
    assert over_all.tolist() == [[False] * 4, [True] * 4]
    assert over_head.tolist() == [[True, False, False, False], [False] * 4]
    # The study takes a head's largest by its head's mean, whatever the mean for the rest is.
    assert thresholded(norms**2, norms, Rule(1.5, "global")).tolist() == over_head.tolist()


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999), multiple=st.floats(0.5, 4))
def test_controls_are_as_many_and_never_the_treated(
    shape: tuple[int, int], seed: int, multiple: float
) -> None:
    sizes, rule = squares(shape, seed), Rule(multiple)
    treated = massive(sizes, sizes, rule)
    for name in ("random-count", "random-norm"):
        control = RECIPES[name].choose(sizes, draw(shape, seed), rule)
        assert not (control & treated).any()
        if name == "random-count":
            assert control.sum() == min(treated.sum(), (~treated).sum())
    assert RECIPES["random-any"].choose(sizes, draw(shape, seed), rule).sum() == treated.sum()
    top = RECIPES["top-1"].choose(sizes, sizes, rule)
    for name in ("smallest", "top-1-random"):
        control = RECIPES[name].choose(sizes, draw(shape, seed), rule)
        assert control.sum(-1).tolist() == [1] * shape[0]
        assert not (control & top).any()
    assert (sizes[RECIPES["smallest"].choose(sizes, sizes, rule)] == sizes.min(-1)).all()
    assert (sizes[top] == sizes.max(-1)).all()


def test_a_random_cell_of_any_kind_is_massive_now_and_then() -> None:
    """The study's control draws among all cells; the default one must not."""
    sizes = np.array([[100.0, 1.0, 1.0, 1.0]] * 2)
    hits = {
        name: sum(
            int(sizes[RECIPES[name].choose(sizes, draw((2, 4), seed), Rule(2.0))].max() > 1)
            for seed in range(50)
        )
        for name in ("random-any", "random-count")
    }
    assert hits["random-any"] > 5
    assert hits["random-count"] == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n_treated=st.integers(1, 3))
def test_a_matched_sum_is_as_near_as_one_step_can_bring_it(seed: int, n_treated: int) -> None:
    """No cell can be added, dropped or exchanged to come nearer, unless it is near enough."""
    sizes = squares((3, 6), seed)
    treated = np.zeros(18, bool)
    treated[np.argsort(sizes.reshape(-1))[-n_treated:]] = True
    treated = treated.reshape(3, 6)
    found = matched(sizes, treated, draw((3, 6), seed))
    aim, free = sizes[treated].sum(), sizes[~treated & ~found]
    gap = abs(aim - sizes[found].sum())
    assert not (found & treated).any()
    if gap > NEAR * aim:
        for less in (0.0, *sizes[found]):
            for more in (0.0, *free):
                assert abs(aim - sizes[found].sum() + less - more) >= gap * (1 - 1e-9)


def test_a_sum_that_others_can_reach_is_matched() -> None:
    sizes = np.abs(np.random.default_rng(0).standard_normal((8, 32)))
    sizes[0, 0] = 40.0
    treated = sizes == 40.0
    found = [matched(sizes, treated, draw((8, 32), seed)) for seed in range(5)]
    assert all(abs(sizes[each].sum() / 40.0 - 1) <= NEAR for each in found)
    assert len({each.tobytes() for each in found}) == 5


@pytest.mark.parametrize("tensor", ["q", "k"])
def test_norms_of_a_large_model_are_matched(tensor: str) -> None:
    """Llama-2-7B-chat, one layer: 4096 cells, of which 48 queries' and 49 keys' are massive."""
    stored = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "jin_qkv_llama2.json").read_text())
    sizes, rule = np.array(stored[f"M_{tensor}"]) ** 2, Rule()
    treated = massive(sizes, sizes, rule)
    assert treated.sum() == stored["massive"][f"{tensor}_post"]["count_lambda5_global"]
    for seed in range(2):
        control = RECIPES["random-norm"].choose(sizes, draw(sizes.shape, seed), rule)
        assert not (control & treated).any()
        assert abs(sizes[control].sum() / sizes[treated].sum() - 1) <= NEAR
        assert control.sum() > 5 * treated.sum()


def test_nothing_is_matched_by_nothing() -> None:
    sizes = np.ones((2, 4))
    assert not matched(sizes, np.zeros((2, 4), bool), sizes).any()
    sizes[0, 0] = 0.0
    assert not matched(sizes, sizes == 0, np.ones((2, 4))).any()


def moments(n: int) -> Moments:
    found = Moments()
    for place in range(n):
        text = f"{place:02d}"
        found.squares[text] = {(0, "q"): np.full((1, 2), 10.0**place)}
        found.sums[text] = {(0, "q"): np.full((1, 2), 10.0**place)}
        found.n_tokens[text] = 2
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_folds_leave_a_text_s_own_out(n: int) -> None:
    seen = moments(5)
    folds = Folds.deal(seen, n)
    assert folds is not None
    assert folds.n == n
    for text, fold in folds.of.items():
        assert text not in folds.others[fold]
        assert set(folds.others[fold]) == {other for other in folds.of if folds.of[other] != fold}
    assert len(folds.others[-1]) == 5
    assert sorted(text for fold in range(n) for text in folds.members(fold)) == sorted(folds.of)


def test_more_folds_than_texts_are_as_many_as_texts() -> None:
    folds = Folds.deal(moments(3), 9)
    assert folds is not None
    assert folds.n == 3
    assert Folds.deal(moments(1), 2) is None


def test_a_mean_is_over_tokens_and_not_over_texts() -> None:
    seen = moments(2)
    seen.n_tokens["00"] = 8
    assert seen.mean(["00", "01"], (0, "q")).tolist() == [[1.1, 1.1]]
    assert seen.squared(["00", "01"], (0, "q")).tolist() == [[11.0, 11.0]]
