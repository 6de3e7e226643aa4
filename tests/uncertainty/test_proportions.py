"""Wilson's interval of a proportion such as an accuracy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from phaselens.uncertainty import wilson_interval


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 10), (30, 100), (1, 2)])
def test_the_interval_equals_the_closed_form(successes, n, confidence):
    """Roots of (p − p̂)² = z² p (1 − p) / n."""
    z = stats.norm.ppf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    proportion = wilson_interval(successes, n, confidence=confidence)
    assert (proportion.value, proportion.ci_low, proportion.ci_high) == pytest.approx(
        (share, centre - half, centre + half), abs=1e-12
    )


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_contains_the_share_and_mirrors_with_it(drawn):
    successes, n = drawn
    proportion, mirrored = wilson_interval(successes, n), wilson_interval(n - successes, n)
    assert 0 <= proportion.ci_low <= proportion.value <= proportion.ci_high <= 1
    assert proportion.ci_low < proportion.ci_high
    assert (1 - mirrored.ci_high, 1 - mirrored.ci_low) == pytest.approx(
        (proportion.ci_low, proportion.ci_high), abs=1e-12
    )


def test_no_success_in_five_has_a_wide_interval():
    proportion = wilson_interval(0, 5)
    assert (proportion.ci_low, proportion.ci_high) == (0.0, pytest.approx(0.4345, abs=1e-4))


def test_intervals_have_nearly_their_nominal_coverage():
    drawn = np.random.default_rng(0).binomial(50, 0.3, 4000)
    bounds = {int(k): wilson_interval(int(k), 50) for k in np.unique(drawn)}
    assert 0.93 < np.mean([bounds[int(k)].ci_low <= 0.3 <= bounds[int(k)].ci_high for k in drawn]) < 0.97


def test_too_few_items_have_no_interval():
    of_one = wilson_interval(1, 1)
    assert (of_one.value, of_one.ci_low, of_one.ci_high) == (1.0, None, None)
    assert of_one.reasons == dict.fromkeys(("ci_low", "ci_high"), "1 item; an interval needs at least 2")
    of_none = wilson_interval(0, 0)
    assert of_none.value is None
    assert set(of_none.reasons) == {"value", "ci_low", "ci_high"}


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match=f"expected 0 to n = {n} successes, received {successes}"):
        wilson_interval(successes, n)


def test_an_impossible_confidence_is_refused():
    with pytest.raises(ValueError, match="confidence between 0 and 1, received 2"):
        wilson_interval(1, 2, confidence=2)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 1), (0, 1), (1, 2), (3, 10)])
def test_a_share_has_its_counts_and_a_reason_for_each_missing_field(successes: int, n: int) -> None:
    share = wilson_interval(successes, n)
    assert (share.successes, share.n) == (successes, n)
    assert share.value == (successes / n if n else None)
    missing = [name for name in ("value", "ci_low", "ci_high") if getattr(share, name) is None]
    assert sorted(share.reasons) == sorted(missing)
    assert bool(missing) == (n < 2)
