"""Bootstrap over texts: scipy's own numbers, missing values, and intervals that mean what they say."""

import doctest
import importlib
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
