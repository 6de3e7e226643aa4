"""Losses under a condition: scipy's numbers, hand-made ones, planted truths, and no number without its ground."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from phaselens.uncertainty import LossComparison, compare_conditions, compare_losses


def texts(n_texts: int, n_conditions: int = 1, seed: int = 0, effect: float = 0.2):
    """baseline [text], conditions [text, condition], n_predicted [text]; losses of texts spread more than effects."""
    rng = np.random.default_rng(seed)
    baseline = rng.gamma(9.0, 0.35, n_texts)
    conditions = baseline[:, None] + effect + rng.normal(scale=0.3, size=(n_texts, n_conditions))
    return baseline, conditions, rng.integers(20, 500, n_texts)


def numbers(found: LossComparison) -> dict[str, float | None]:
    """All fields but the reasons."""
    return {name: value for name, value in dataclasses.asdict(found).items() if name != "reasons"}


def same(first: LossComparison, second: LossComparison, *names: str, rel: float = 1e-9) -> None:
    for name in names or numbers(first):
        found, wanted = getattr(first, name), getattr(second, name)
        assert (found is None) == (wanted is None), name
        assert wanted is None or found == pytest.approx(wanted, rel=rel, abs=1e-12), name


def test_intervals_are_scipys_paired_bootstrap_of_the_same_draws():
    baseline, conditions, tokens = texts(25)
    condition = conditions[:, 0]

    def delta(before, after, weights, axis):
        return (weights * (after - before)).sum(axis) / weights.sum(axis)

    def ratio(before, after, weights, axis):
        total = weights.sum(axis)
        return np.exp((weights * after).sum(axis) / total) / np.exp((weights * before).sum(axis) / total)

    found = compare_losses(baseline, condition, tokens, confidence=0.9, n_resamples=999, seed=7)
    for statistic, low, high in (
        (delta, found.delta_low, found.delta_high),
        (ratio, found.ci_low, found.ci_high),
    ):
        want = stats.bootstrap(
            (baseline, condition, tokens.astype(float)),
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=999,
            confidence_level=0.9,
            rng=np.random.default_rng(7),
        ).confidence_interval
        assert (low, high) == pytest.approx((want.low, want.high), rel=1e-10)


@pytest.mark.parametrize("effect", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("n_texts", [2, 5, 11, 13])
def test_p_is_scipys_exact_paired_permutation(n_texts, effect):
    baseline, conditions, tokens = texts(n_texts, seed=n_texts, effect=effect)
    found = compare_losses(baseline, conditions[:, 0], tokens)
    want = stats.permutation_test(
        (baseline * tokens, conditions[:, 0] * tokens),
        lambda before, after, axis: (after - before).sum(axis),
        permutation_type="samples",
        vectorized=True,
    )
    assert found.p_exact
    assert found.p_value == pytest.approx(want.pvalue, rel=1e-12)


def test_ties_stay_ties_where_tenths_are_rounded():
    """Differences in tenths tie as the same whole numbers do, though 0.1 + 0.2 is not 0.3 to the last bit."""
    whole = np.random.default_rng(0).integers(-9, 10, (9, 40)).astype(float)
    none, ones = np.zeros(9), np.ones(9)
    tenths = compare_conditions(none, whole / 10, ones)
    assert [each.p_value for each in tenths] == [
        each.p_value for each in compare_conditions(none, whole, ones)
    ]


def test_p_of_many_texts_is_drawn_and_agrees_with_all_of_them():
    baseline, conditions, tokens = texts(16, 8, seed=3, effect=0.1)
    exact = compare_conditions(baseline, conditions, tokens, n_permutations=2**16)
    drawn = compare_conditions(baseline, conditions, tokens, n_permutations=2**16 - 1)
    assert [each.p_exact for each in exact + drawn] == [True] * 8 + [False] * 8
    assert len({each.p_value for each in exact}) > 4
    for all_of_them, some in zip(exact, drawn, strict=True):
        sd = math.sqrt(all_of_them.p_value * (1 - all_of_them.p_value) / 2**16)
        assert abs(all_of_them.p_value - some.p_value) < 5 * sd + 2**-15


def test_a_drawn_p_is_never_zero():
    found = compare_losses(np.ones(40), np.linspace(5, 6, 40), np.full(40, 100), n_permutations=999)
    assert (found.p_value, found.p_exact) == (1 / 1000, False)


def test_two_texts_worked_out_by_hand():
    found = compare_losses([1.0, 3.0], [2.0, 3.5], [10, 30], lengths=[11, 31], n_resamples=4000)
    assert (found.n_texts, found.n_predicted) == (2, 40)
    assert (found.loss_baseline, found.loss, found.delta_nats) == (2.5, 3.125, 0.625)
    assert found.ppl_baseline == pytest.approx(math.exp(2.5))
    assert found.ppl == pytest.approx(math.exp(3.125))
    assert found.ratio == pytest.approx(math.exp(0.625))
    assert found.increase_percent == pytest.approx(100 * math.expm1(0.625))
    # Resamples: the first text alone (1 nat), both (0.625), the second alone (0.5), 1 : 2 : 1.
    assert (found.delta_low, found.delta_high) == (0.5, 1.0)
    assert (found.ci_low, found.ci_high) == pytest.approx((math.exp(0.5), math.exp(1.0)))
    # Of 4 exchanges, none and all are as large as what was seen.
    assert (found.p_value, found.p_exact) == (0.5, True)
    # The mean difference, 0.625, over its sd, both with weights 1/4 and 3/4.
    variance = 2 / 1 * (0.25 * 0.375**2 + 0.75 * 0.125**2)
    assert found.d_z == pytest.approx(0.625 / math.sqrt(variance))
    assert (found.rank_biserial, found.share_worse) == (1.0, 1.0)
    assert found.ppl_baseline_length_weighted == pytest.approx(math.exp((11 * 1 + 31 * 3) / 42))
    assert found.ppl_length_weighted == pytest.approx(math.exp((11 * 2 + 31 * 3.5) / 42))
    assert found.ratio_length_weighted == pytest.approx(math.exp((11 * 1 + 31 * 0.5) / 42))
    assert found.reasons == {}


def test_ranks_and_shares_worked_out_by_hand():
    found = compare_losses(np.zeros(5), [1.0, -2.0, 3.0, 0.0, 0.0], np.full(5, 4))
    assert found.rank_biserial == pytest.approx((1 - 2 + 3) / 6)
    assert found.share_worse == 0.4
    assert found.d_z == pytest.approx(0.4 / np.std([1, -2, 3, 0, 0], ddof=1))


def test_rank_biserial_is_wilcoxons_rank_sum():
    baseline, conditions, tokens = texts(30, effect=0.05)
    difference = (conditions[:, 0] - baseline).round(1)
    found = compare_losses(np.zeros(30), difference, tokens)
    n = np.count_nonzero(difference)
    positive = stats.wilcoxon(difference, alternative="greater", method="approx").statistic
    assert found.rank_biserial == pytest.approx(2 * positive / (n * (n + 1) / 2) - 1)


def test_the_ratio_is_of_all_tokens_and_no_mean_of_ratios():
    """One short text that breaks and one long text that does not: 60 times worse, were texts' ratios averaged."""
    found = compare_losses([2.0, 2.0], [6.8, 2.0], [10, 990])
    assert found.ratio == pytest.approx(math.exp(0.048))
    assert found.ratio < 1.05 < 60 < np.mean(np.exp([4.8, 0.0]))


@pytest.mark.parametrize("n_texts", [2, 9, 60])
def test_nothing_changed_is_exactly_nothing(n_texts):
    baseline, _, tokens = texts(n_texts)
    found = compare_losses(baseline, baseline.copy(), tokens, lengths=tokens + 1)
    assert (found.ratio, found.ci_low, found.ci_high, found.ratio_length_weighted) == (1.0, 1.0, 1.0, 1.0)
    assert (found.delta_nats, found.delta_low, found.delta_high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert (found.share_worse, found.increase_percent) == (0.0, 0.0)
    assert found.reasons == dict.fromkeys(("d_z", "rank_biserial"), "all differences are 0")


def test_one_amount_for_all_texts_has_no_effect_size():
    """0.1 more for each, but for rounding: their spread is the rounding's, and no effect in units of it is real."""
    baseline, _, tokens = texts(12)
    found = compare_losses(baseline, baseline + 0.1, tokens, lengths=tokens + 1)
    assert np.std(baseline + 0.1 - baseline) > 0
    assert (found.d_z, found.rank_biserial) == (None, 1.0)
    assert found.reasons == {"d_z": "all texts differ by the same amount, 0.1, up to rounding"}


def test_one_text_has_a_ratio_and_no_spread():
    found = compare_losses([2.0], [3.0], [50], lengths=[51])
    assert found.ratio == pytest.approx(math.e)
    unknown = {name for name, value in numbers(found).items() if value is None}
    assert unknown == {
        "ci_low", "ci_high", "delta_low", "delta_high", "p_value", "p_exact", "d_z", "rank_biserial", "share_worse",
    }  # fmt: skip
    assert found.reasons == dict.fromkeys(unknown, "1 text; spread over texts needs at least 2")


def test_texts_without_a_predicted_token_are_left_out():
    kept = compare_losses([2.0, 1.0, 3.0], [2.5, 1.1, 3.0], [5, 6, 7], lengths=[6, 7, 8])
    more = compare_losses(
        [2.0, np.nan, 1.0, 3.0], [2.5, np.nan, 1.1, 3.0], [5, 0, 6, 7], lengths=[6, 1, 7, 8]
    )
    assert more == kept
    none = compare_losses([np.nan], [np.nan], [0])
    assert (none.n_texts, none.n_predicted, none.ppl, none.p_value) == (0, 0, None, None)
    assert none.reasons["ratio"] == none.reasons["ppl_baseline"] == "no text has a predicted token"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_no_number_spoils_its_own_condition_only(bad):
    baseline, conditions, tokens = texts(9, 3)
    whole = compare_conditions(baseline, conditions, tokens)
    conditions[4, 1] = bad
    found = compare_conditions(baseline, conditions, tokens)
    assert (found[0], found[2]) == (whole[0], whole[2])
    assert (found[1].loss, found[1].ratio, found[1].ci_low, found[1].p_value, found[1].d_z) == (None,) * 5
    assert found[1].reasons["ratio"] == "the loss of 1 of 9 texts is NaN or infinite under the condition"
    assert found[1].ppl_baseline == whole[1].ppl_baseline
    baseline[0] = bad
    for each in compare_conditions(baseline, conditions, tokens):
        assert (each.ppl_baseline, each.ratio) == (None, None)
        assert each.reasons["ratio"] == "the loss of 1 of 9 texts is NaN or infinite at baseline"
    assert each.ppl == whole[2].ppl


def test_losses_far_beyond_uniform_keep_their_nats_where_exp_overflows():
    found = compare_losses([2.0, 3.0], [22.0, 27.0], [10, 10])
    assert found.ratio == pytest.approx(math.exp(22))
    found = compare_losses([2.0, 3.0], [2000.0, 3000.0], [10, 10])
    assert (found.delta_nats, found.loss, found.p_value) == (2497.5, 2500.0, 0.5)
    assert (found.ratio, found.ppl, found.ci_low, found.ci_high) == (None,) * 4
    assert found.reasons["ratio"] == "exp(2497.5) is beyond float64; the exponent, in nats, is known"
    assert (found.delta_low, found.delta_high) == (1998.0, 2997.0)
    assert "delta_low and delta_high are known" in found.reasons["ci_high"]
    found = compare_losses([800.0, 801.0], [801.0, 802.0], [10, 10])
    assert (found.ppl, found.ratio) == (None, pytest.approx(math.e))
    assert compare_losses([900.0, 900.0], [0.0, 0.0], [1, 1]).ratio is None, "and no 0 where exp underflows"


def test_conditions_neither_see_each_other_nor_their_order():
    baseline, conditions, tokens = texts(60, 12)
    together = compare_conditions(baseline, conditions, tokens, lengths=tokens + 1)
    alone = [
        compare_losses(baseline, column, tokens, lengths=tokens + 1)
        for column in np.ascontiguousarray(conditions.T)
    ]
    turned = compare_conditions(baseline, conditions[:, ::-1], tokens, lengths=tokens + 1)
    assert together == alone == turned[::-1]


def test_the_same_seed_gives_the_same_numbers():
    baseline, conditions, tokens = texts(30)
    first, again, other = (
        compare_losses(baseline, conditions[:, 0], tokens, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.ci_low != other.ci_low
    assert first.p_value != other.p_value
    same(first, other, "ratio", "d_z", "rank_biserial", "ppl")


def test_no_conditions_is_no_comparison():
    assert compare_conditions([1.0, 2.0], np.empty((2, 0)), [3, 4]) == []


@pytest.mark.slow
def test_intervals_cover_the_truth_and_p_is_as_rare_as_it_says():
    rng = np.random.default_rng(5)
    baseline, tokens = rng.gamma(9.0, 0.35, 40), rng.integers(100, 400, 40)
    noise = rng.normal(scale=0.3, size=(40, 1000))
    found = compare_conditions(
        baseline, baseline[:, None] + 0.1 + noise, tokens, n_resamples=800, n_permutations=1
    )
    covered = np.mean([each.delta_low <= 0.1 <= each.delta_high for each in found])
    assert 0.91 < covered < 0.97
    assert covered == np.mean([each.ci_low <= math.exp(0.1) <= each.ci_high for each in found])
    null = compare_conditions(baseline, baseline[:, None] + noise, tokens, n_resamples=1, n_permutations=999)
    for level in (0.05, 0.5):
        assert np.mean([each.p_value <= level for each in null]) == pytest.approx(
            level, abs=0.05 * level**0.5 + 0.01
        )


def test_pairing_sees_through_what_texts_share():
    """Texts differ by nats, the condition adds hundredths: unpaired arms would overlap."""
    rng = np.random.default_rng(6)
    baseline = rng.gamma(9.0, 0.35, 50)
    found = compare_losses(baseline, baseline + 0.03 + rng.normal(scale=0.01, size=50), np.full(50, 200))
    assert 0.02 < found.delta_low < found.delta_high < 0.04
    assert found.p_value < 0.001
    assert found.d_z > 2


# Losses in steps of 1/1024: sums and differences are exact, so that properties hold to the last bit of ties.
STEPS = st.integers(0, 20 * 1024).map(lambda steps: steps / 1024)


@st.composite
def arms(draw):
    n_texts = draw(st.integers(2, 14))
    lists = [
        st.lists(values, min_size=n_texts, max_size=n_texts) for values in (STEPS, STEPS, st.integers(1, 9))
    ]
    return tuple(np.array(draw(each)) for each in lists)


FEW = {"n_resamples": 60, "n_permutations": 9999}


@settings(max_examples=60, deadline=None)
@given(arms(), st.integers(-5, 5), st.integers(2, 5))
def test_what_both_arms_share_and_the_size_of_weights_do_not_matter(drawn, shift, factor):
    baseline, condition, tokens = drawn
    found = compare_losses(baseline, condition, tokens, **FEW)
    of_differences = (
        "ratio",
        "ci_low",
        "ci_high",
        "delta_nats",
        "p_value",
        "d_z",
        "rank_biserial",
        "share_worse",
    )
    same(found, compare_losses(baseline + shift, condition + shift, tokens, **FEW), *of_differences)
    more = compare_losses(baseline, condition, tokens * factor, **FEW)
    same(found, dataclasses.replace(more, n_predicted=found.n_predicted), *numbers(found))


@settings(max_examples=60, deadline=None)
@given(arms(), st.randoms())
def test_order_of_texts_moves_only_the_draws(drawn, random):
    order = list(range(len(drawn[0])))
    random.shuffle(order)
    found, moved = (
        compare_losses(*(each[at] for each in drawn), **FEW)
        for at in (np.arange(len(order)), np.array(order))
    )
    drawn_by_chance = {"ci_low", "ci_high", "delta_low", "delta_high"} | (
        set() if found.p_exact else {"p_value"}
    )
    same(found, moved, *(name for name in numbers(found) if name not in drawn_by_chance))


@settings(max_examples=60, deadline=None)
@given(arms())
def test_swapping_the_arms_mirrors_the_answer(drawn):
    baseline, condition, tokens = drawn
    there, back = (
        compare_losses(baseline, condition, tokens, **FEW),
        compare_losses(condition, baseline, tokens, **FEW),
    )
    assert back.delta_nats == pytest.approx(-there.delta_nats, abs=1e-12)
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert (back.delta_low, back.delta_high) == pytest.approx(
        (-there.delta_high, -there.delta_low), abs=1e-12
    )
    assert back.p_value == there.p_value
    if there.d_z is not None:
        assert (back.d_z, back.rank_biserial) == pytest.approx((-there.d_z, -there.rank_biserial))


HOSTILE = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 1.0, 20.0, 709.0, 710.0, 1e30, np.inf, np.nan])
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 6))
def test_whatever_is_none_has_a_reason_and_whatever_is_not_is_finite(data, n_texts):
    columns = [data.draw(arrays.arrays(np.float64, n_texts, elements=HOSTILE)) for _ in range(2)]
    tokens = data.draw(arrays.arrays(np.int64, n_texts, elements=st.integers(0, 5)))
    lengths = data.draw(st.sampled_from([None, tokens + 1]))
    found = compare_losses(*columns, tokens, lengths=lengths, n_resamples=20)
    assert {name for name, value in numbers(found).items() if value is None} == set(found.reasons)
    assert all(found.reasons.values())
    assert all(math.isfinite(value) for value in numbers(found).values() if value is not None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": [[1.0], [2.0]]}, r"expected baseline \[text\], received shape \(2, 1\)"),
        ({"condition": 1.0}, r"expected condition \[text\], received shape \(\)"),
        ({"condition": [1.0, 2.0, 3.0]}, "same texts in all, received baseline of 2, conditions of 3"),
        ({"n_predicted": [5, -1]}, "n_predicted of at least 0, received -1.0 for text 1"),
        ({"n_predicted": [5, np.nan]}, "n_predicted of at least 0, received nan for text 1"),
        ({"n_predicted": [5, 4.5]}, "whole numbers for n_predicted, received 4.5 for text 1"),
        ({"lengths": [6]}, "lengths of 1"),
        ({"lengths": [6, 3]}, "lengths of at least n_predicted"),
        ({"confidence": 95}, "confidence between 0 and 1, received 95"),
        ({"n_resamples": 0}, "at least 1 resample, received 0"),
        ({"n_permutations": 0}, "at least 1 permutation, received 0"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_was_expected_and_received(change, said):
    arguments = {"baseline": [1.0, 2.0], "condition": [1.5, 2.0], "n_predicted": [5, 6]} | change
    with pytest.raises(ValueError, match=said):
        compare_losses(**arguments)


def test_value_interval_p_and_effect_size_are_of_one_mean():
    """All are of the mean over predicted tokens, to which a text contributes by its length."""
    difference, tokens = np.array([1.0, -0.5, 2.0, 0.25]), np.array([10, 40, 5, 25])
    found = compare_losses(np.zeros(4), difference, tokens)
    share = tokens / tokens.sum()
    mean = share @ difference
    assert found.delta_nats == pytest.approx(mean)
    assert found.d_z == pytest.approx(mean / math.sqrt(4 / 3 * share @ (difference - mean) ** 2))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    assert found.p_value == np.mean(np.abs(signs @ (share * difference)) >= abs(mean) - 1e-12)
    every = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    means = np.sort((tokens * difference)[every].sum(1) / tokens[every].sum(1))
    at = math.ceil(0.025 * len(every)) - 1
    assert (found.delta_low, found.delta_high) == pytest.approx((means[at], means[-1 - at]))
    assert (found.ci_low, found.ci_high) == pytest.approx((math.exp(means[at]), math.exp(means[-1 - at])))
    equal = compare_losses(np.zeros(4), difference, np.full(4, 7))
    assert equal.d_z == pytest.approx(difference.mean() / difference.std(ddof=1))


def test_of_eight_texts_the_interval_is_the_same_for_every_seed():
    baseline, conditions, tokens = texts(8)
    ends = {
        (round(found.delta_low, 12), round(found.delta_high, 12), round(found.ci_high, 12))
        for found in (compare_losses(baseline, conditions[:, 0], tokens, seed=seed) for seed in range(5))
    }
    assert len(ends) == 1
