"""Properties of comparisons of losses, for any losses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.uncertainty.comparisons import compare_losses
from tests.uncertainty.fields import assert_same_fields, numeric_fields

# Losses are multiples of 1/1024: sums and differences are exact, so ties are exact too.
STEPS = st.integers(0, 20 * 1024).map(lambda steps: steps / 1024)


@st.composite
def arms(draw):
    n_texts = draw(st.integers(2, 14))
    strategies = [
        st.lists(elements, min_size=n_texts, max_size=n_texts)
        for elements in (STEPS, STEPS, st.integers(1, 9))
    ]
    return tuple(np.array(draw(strategy)) for strategy in strategies)


FEW = {"n_resamples": 60, "n_permutations": 9999}


@settings(max_examples=60, deadline=None)
@given(arms(), st.integers(-5, 5), st.integers(2, 5))
def test_a_shared_shift_and_the_scale_of_weights_have_no_effect(drawn, shift, factor):
    baseline, condition, tokens = drawn
    comparison = compare_losses(baseline, condition, tokens, **FEW)
    difference_fields = (
        "ratio",
        "ci_low",
        "ci_high",
        "delta_nats",
        "p_value",
        "d_z",
        "rank_biserial",
        "share_worse",
    )
    assert_same_fields(
        comparison, compare_losses(baseline + shift, condition + shift, tokens, **FEW), *difference_fields
    )
    reweighted = compare_losses(baseline, condition, tokens * factor, **FEW)
    assert_same_fields(
        comparison,
        dataclasses.replace(reweighted, n_predicted=comparison.n_predicted),
        *numeric_fields(comparison),
    )


@settings(max_examples=60, deadline=None)
@given(arms(), st.randoms())
def test_the_order_of_texts_affects_only_sampled_values(drawn, random):
    order = list(range(len(drawn[0])))
    random.shuffle(order)
    comparison, reordered = (
        compare_losses(*(values[indices] for values in drawn), **FEW)
        for indices in (np.arange(len(order)), np.array(order))
    )
    sampled_fields = {"ci_low", "ci_high", "delta_low", "delta_high"} | (
        set() if comparison.p_exact else {"p_value"}
    )
    assert_same_fields(
        comparison, reordered, *(name for name in numeric_fields(comparison) if name not in sampled_fields)
    )


@settings(max_examples=60, deadline=None)
@given(arms())
def test_swapping_the_arms_mirrors_the_comparison(drawn):
    baseline, condition, tokens = drawn
    comparison, swapped = (
        compare_losses(baseline, condition, tokens, **FEW),
        compare_losses(condition, baseline, tokens, **FEW),
    )
    assert swapped.delta_nats == pytest.approx(-comparison.delta_nats, abs=1e-12)
    assert swapped.ratio == pytest.approx(1 / comparison.ratio)
    assert (swapped.delta_low, swapped.delta_high) == pytest.approx(
        (-comparison.delta_high, -comparison.delta_low), abs=1e-12
    )
    assert swapped.p_value == comparison.p_value
    if comparison.d_z is not None:
        assert (swapped.d_z, swapped.rank_biserial) == pytest.approx(
            (-comparison.d_z, -comparison.rank_biserial)
        )


HOSTILE = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 1.0, 20.0, 709.0, 710.0, 1e30, np.inf, np.nan])
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 6))
def test_values_are_finite_or_missing_with_a_reason(data, n_texts):
    columns = [data.draw(arrays.arrays(np.float64, n_texts, elements=HOSTILE)) for _ in range(2)]
    tokens = data.draw(arrays.arrays(np.int64, n_texts, elements=st.integers(0, 5)))
    lengths = data.draw(st.sampled_from([None, tokens + 1]))
    comparison = compare_losses(*columns, tokens, lengths=lengths, n_resamples=20)
    assert {name for name, value in numeric_fields(comparison).items() if value is None} == set(
        comparison.reasons
    )
    assert all(comparison.reasons.values())
    assert all(math.isfinite(value) for value in numeric_fields(comparison).values() if value is not None)
