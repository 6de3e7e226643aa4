"""Accuracies: Wilson's interval, and what was asked against what was answered."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from phaselens.uncertainty import accuracy, wilson_interval


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 10), (30, 100), (1, 2)])
def test_equals_the_closed_form(successes, n, confidence):
    """Roots of (p − p̂)² = z² p (1 − p) / n."""
    z = stats.norm.ppf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = wilson_interval(successes, n, confidence=confidence)
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx(
        (share, centre - half, centre + half), abs=1e-12
    )


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_holds_the_share_and_mirrors(drawn):
    successes, n = drawn
    found, other = wilson_interval(successes, n), wilson_interval(n - successes, n)
    assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1
    assert found.ci_low < found.ci_high
    assert (1 - other.ci_high, 1 - other.ci_low) == pytest.approx((found.ci_low, found.ci_high), abs=1e-12)


def test_none_right_of_five_leaves_much_open():
    found = wilson_interval(0, 5)
    assert (found.ci_low, found.ci_high) == (0.0, pytest.approx(0.4345, abs=1e-4))


def test_covers_the_truth_about_as_often_as_it_says():
    drawn = np.random.default_rng(0).binomial(50, 0.3, 4000)
    bounds = {int(k): wilson_interval(int(k), 50) for k in np.unique(drawn)}
    assert 0.93 < np.mean([bounds[int(k)].ci_low <= 0.3 <= bounds[int(k)].ci_high for k in drawn]) < 0.97


def test_too_few_items_have_no_interval():
    one = wilson_interval(1, 1)
    assert (one.value, one.ci_low, one.ci_high) == (1.0, None, None)
    assert one.reasons == dict.fromkeys(("ci_low", "ci_high"), "1 item; an interval needs at least 2")
    none = wilson_interval(0, 0)
    assert none.value is None
    assert set(none.reasons) == {"value", "ci_low", "ci_high"}


def test_unanswered_is_not_right_and_is_not_left_out_either():
    """49 % of all, or 98 % of the half that could be read: both are given, with the half."""
    found = accuracy(correct=49, n_answered=50, n_asked=100)
    assert (found.of_asked.value, found.of_answered.value, found.coverage.value) == (0.49, 0.98, 0.5)
    assert found.of_asked == wilson_interval(49, 100)
    silent = accuracy(0, 0, 20)
    assert (silent.of_asked.value, silent.of_answered.value, silent.coverage.value) == (0.0, None, 0.0)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, -1)])
def test_counts_that_cannot_be(successes, n):
    with pytest.raises(ValueError, match=f"expected 0 to n = {n} successes, received {successes}"):
        wilson_interval(successes, n)


def test_bad_arguments_of_accuracy():
    with pytest.raises(ValueError, match="received correct 3, n_answered 2, n_asked 9"):
        accuracy(3, 2, 9)
    with pytest.raises(ValueError, match="confidence between 0 and 1, received 2"):
        wilson_interval(1, 2, confidence=2)
