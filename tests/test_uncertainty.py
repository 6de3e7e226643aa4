"""Bootstrap over texts: scipy's own numbers, missing values, and intervals that mean what they say."""

import doctest
import importlib
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from phaselens.uncertainty import mean_interval, paired_interval


def test_equals_scipys_percentile_bootstrap_of_the_same_draws():
    values = np.random.default_rng(1).gamma(1.0, size=12)
    mean, low, high = mean_interval(values, seed=7, n_resamples=999, confidence=0.9)
    want = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=999,
        confidence_level=0.9,
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert float(mean) == pytest.approx(values.mean(), rel=1e-12)
    assert (float(low), float(high)) == pytest.approx((want.low, want.high), rel=1e-12)


def test_a_cell_does_not_depend_on_the_other_cells():
    values = np.random.default_rng(2).normal(size=(9, 3, 4))
    whole = mean_interval(values, n_resamples=200)
    for index in np.ndindex(3, 4):
        alone = mean_interval(values[:, *index], n_resamples=200)
        assert [float(part[index]) for part in whole] == pytest.approx(
            [float(part) for part in alone], rel=1e-12
        )


def test_missing_values_leave_the_cell_as_if_the_text_were_not_there():
    values = np.random.default_rng(3).normal(size=(8, 3))
    present = np.ones((8, 3), bool)
    present[[1, 4], 1] = False
    present[1:, 2] = False
    spoiled = np.where(present, values, np.nan)
    mean, low, high = mean_interval(spoiled, present=present, n_resamples=300)
    kept = mean_interval(values[present[:, 1], 1], n_resamples=300)
    assert [float(part[1]) for part in (mean, low, high)] == pytest.approx(
        [float(part) for part in kept], rel=1e-12
    )
    assert mean.tolist()[2] == values[0, 2]
    assert low.tolist()[2] is None
    assert high.tolist()[2] is None


def test_no_text_at_all_is_missing_and_not_zero():
    mean, low, high = mean_interval(np.zeros((3, 2)), present=np.zeros((3, 2), bool))
    assert mean.tolist() == low.tolist() == high.tolist() == [None, None]
    assert [part.tolist() for part in mean_interval(np.empty((0, 2)))] == [[None, None]] * 3


def test_texts_that_agree_give_an_interval_of_width_zero():
    mean, low, high = mean_interval(np.full((11, 5), 0.1))
    assert (low == high).all()
    assert (low == mean).all()
    assert mean.tolist() == [0.1] * 5


def test_nan_and_infinity_are_refused_with_their_number():
    with pytest.raises(ValueError, match="2 of 3 values are NaN or infinite"):
        mean_interval([0.0, np.nan, np.inf])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"values": 3.0}, "received a single number"),
        (
            {"values": [1.0, 2.0], "present": [True]},
            r"expected present of the values' shape \(2,\), received \(1,\)",
        ),
        ({"values": [1.0], "confidence": 1.0}, "confidence between 0 and 1, received 1.0"),
        ({"values": [1.0], "n_resamples": 0}, "at least 1 resample, received 0"),
    ],
)
def test_bad_arguments_say_what_was_expected_and_received(arguments, said):
    with pytest.raises(ValueError, match=said):
        mean_interval(**arguments)


def test_a_transformed_mean_has_the_interval_of_the_transform():
    values = np.random.default_rng(4).uniform(size=(20, 6))

    def share(means):
        return (means >= 0.5).mean(-1)

    rate, low, high = mean_interval(values, transform=share, n_resamples=500)
    draws = np.random.default_rng(0).integers(0, 20, (500, 20))
    want = np.quantile(share(values[draws].mean(1)), (0.025, 0.975))
    assert float(rate) == share(values.mean(0))
    assert [float(low), float(high)] == pytest.approx(want.tolist())


def test_a_transform_leaves_out_empty_texts_and_refuses_partial_ones():
    values, present = np.arange(6.0).reshape(3, 2), np.ones((3, 2), bool)
    present[1] = False
    kept = mean_interval(values[[0, 2]], transform=lambda m: m.sum(-1))
    left = mean_interval(values, present=present, transform=lambda m: m.sum(-1))
    assert [float(part) for part in left] == [float(part) for part in kept]
    present[1, 0] = True
    with pytest.raises(ValueError, match="1 of 3 texts have some values missing"):
        mean_interval(values, present=present, transform=lambda m: m.sum(-1))


def test_paired_differences_see_through_what_the_texts_share():
    rng = np.random.default_rng(5)
    text = rng.normal(scale=10.0, size=30)
    first, second = text + 0.5 + rng.normal(scale=0.05, size=30), text
    mean, low, high = paired_interval(first, second)
    assert 0.45 < float(low) < float(mean) < float(high) < 0.55
    unpaired = mean_interval(first)
    assert float(unpaired[2] - unpaired[1]) > 3.0


def test_paired_differences_use_texts_that_both_have():
    mean, low, _ = paired_interval([1.0, 5.0, np.nan], [0.0, np.nan, 1.0], present=[True, False, False])
    assert (mean.tolist(), low.tolist()) == (1.0, None)
    with pytest.raises(ValueError, match=r"received \(2,\) and \(3,\)"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(6)
    values = rng.normal(loc=1.0, size=(40, 1500))
    _, low, high = mean_interval(values, n_resamples=600)
    covered = ((low <= 1.0) & (high >= 1.0)).mean()
    assert 0.91 < covered < 0.96


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(-50, 50), st.floats(0.01, 20))
def test_shifting_and_scaling_the_values_shifts_and_scales_the_answer(n_texts, seed, shift, factor):
    values = np.random.default_rng(seed).normal(size=n_texts)
    plain = mean_interval(values, n_resamples=100)
    moved = mean_interval(values * factor + shift, n_resamples=100)
    assert [float(p) * factor + shift for p in plain] == pytest.approx([float(p) for p in moved], abs=1e-9)


def test_order_of_texts_does_not_move_the_mean_and_seeds_are_repeatable():
    values = np.random.default_rng(8).normal(size=(15, 2))
    assert mean_interval(values)[1].tolist() == mean_interval(values)[1].tolist()
    assert mean_interval(values, seed=1)[1].tolist() != mean_interval(values, seed=2)[1].tolist()
    assert mean_interval(values[::-1])[0].tolist() == pytest.approx(
        mean_interval(values)[0].tolist(), rel=1e-12
    )


def test_a_large_table_takes_a_moment_only():
    values = np.random.default_rng(9).normal(size=(100, 32, 32))
    start = time.perf_counter()
    mean_interval(values)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("module", ["_arms", "_bootstrap", "_losses", "_proportions"])
def test_the_examples_run(module):
    failed, tried = doctest.testmod(importlib.import_module(f"phaselens.uncertainty.{module}"))
    assert tried
    assert not failed


@pytest.mark.parametrize("n_texts", [2, 3, 5])
def test_few_texts_have_the_interval_of_all_their_resamples(n_texts):
    """Against the n^n ordered draws, one by one."""
    values = np.random.default_rng(n_texts).gamma(1.0, size=(n_texts, 4))
    every = np.array(list(itertools.product(range(n_texts), repeat=n_texts)))
    means = np.sort(values[every].mean(1), axis=0)
    _, low, high = mean_interval(values)
    # The least mean that 2.5 % of the draws reach, and the greatest.
    at = int(np.ceil(0.025 * len(every))) - 1
    assert low.tolist() == pytest.approx(means[at].tolist())
    assert high.tolist() == pytest.approx(means[len(every) - 1 - at].tolist())


def test_of_eight_texts_no_seed_and_no_order_moves_an_end():
    values = np.random.default_rng(8).gamma(0.5, size=(8, 3))
    first = mean_interval(values)
    rng = np.random.default_rng(0)
    for seed in range(1, 6):
        other = mean_interval(values[rng.permutation(8)], seed=seed)
        assert [part.tolist() for part in other] == [pytest.approx(part.tolist()) for part in first]
    rate = [mean_interval(values, transform=lambda mean: (mean > 0.5).mean(-1), seed=seed) for seed in (0, 1)]
    assert [float(part) for part in rate[0]] == [float(part) for part in rate[1]]


def test_all_resamples_agree_with_many_draws():
    values = np.random.default_rng(9).gamma(1.0, size=(7, 5))
    exact, drawn = mean_interval(values), mean_interval(values, n_resamples=1715)  # 1,716 there are
    spread = values.std(0, ddof=1) / np.sqrt(7)
    for one, other in zip(exact[1:], drawn[1:], strict=True):
        assert (np.abs(one - other) < 0.3 * spread).all()
        assert (one != other).any()


def test_more_texts_move_an_end_by_as_little_as_is_said():
    """1.4 % of half the interval's width, and a tail of 1 in 20 seeds beyond twice that."""
    values = np.random.default_rng(10).normal(size=(40, 30))
    ends = np.array([[part.tolist() for part in mean_interval(values, seed=seed)[1:]] for seed in range(12)])
    half = (ends[:, 1] - ends[:, 0]).mean(0) / 2
    share = ends.std(0, ddof=1) / half
    assert 0.010 < share.mean() < 0.018


def test_the_help_of_an_interval_says_what_is_computed():
    from phaselens.plugin import interval_help
    from phaselens.uncertainty import N_RESAMPLES
    from phaselens.uncertainty._bootstrap import resamples

    assert f"of more {N_RESAMPLES:,} drawn by the seed" in interval_help()
    assert "all resamples of up to 8" in interval_help()
    assert resamples(8, N_RESAMPLES, 0).probabilities is not None
    assert resamples(9, N_RESAMPLES, 0).probabilities is None
    assert interval_help("prompts", paired=True).startswith(
        "95 % interval, paired percentile bootstrap over prompts"
    )


@given(st.integers(2, 8))
@settings(max_examples=7, deadline=None)
def test_the_resamples_of_few_texts_are_all_there_are(n_texts):
    from phaselens.uncertainty._bootstrap import resamples

    every = resamples(n_texts, 10_000, 0)
    assert every.counts.shape == (math.comb(2 * n_texts - 1, n_texts), n_texts)
    assert (every.counts.sum(1) == n_texts).all()
    assert len({tuple(row) for row in every.counts.tolist()}) == len(every.counts)
    assert every.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert every.probabilities @ every.counts == pytest.approx(np.ones(n_texts))


def test_draws_are_made_in_blocks_and_are_those_of_one_call(monkeypatch):
    from phaselens.uncertainty import _bootstrap

    whole = _bootstrap.draws(11, 100, 3)
    monkeypatch.setattr(_bootstrap, "_DRAWN_AT_ONCE", 70)
    assert (whole == _bootstrap.draws(11, 100, 3)).all()
