"""Losses under a condition against scipy, hand-computed values and planted effects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from phaselens.uncertainty import compare_conditions
from tests.uncertainty.comparisons import compare_losses
from tests.uncertainty.fields import assert_same_fields, numeric_fields


def texts(n_texts: int, n_conditions: int = 1, seed: int = 0, effect: float = 0.2):
    """baseline [text], conditions [text, condition], n_predicted [text]; texts vary more than conditions."""
    rng = np.random.default_rng(seed)
    baseline = rng.gamma(9.0, 0.35, n_texts)
    conditions = baseline[:, None] + effect + rng.normal(scale=0.3, size=(n_texts, n_conditions))
    return baseline, conditions, rng.integers(20, 500, n_texts)


def test_intervals_equal_scipys_paired_bootstrap_of_the_same_draws():
    baseline, conditions, tokens = texts(25)
    condition = conditions[:, 0]

    def delta(baseline_losses, losses, weights, axis):
        return (weights * (losses - baseline_losses)).sum(axis) / weights.sum(axis)

    def ratio(baseline_losses, losses, weights, axis):
        total = weights.sum(axis)
        return np.exp((weights * losses).sum(axis) / total) / np.exp(
            (weights * baseline_losses).sum(axis) / total
        )

    comparison = compare_losses(baseline, condition, tokens, confidence=0.9, n_resamples=999, seed=7)
    for statistic, low, high in (
        (delta, comparison.delta_low, comparison.delta_high),
        (ratio, comparison.ci_low, comparison.ci_high),
    ):
        expected = stats.bootstrap(
            (baseline, condition, tokens.astype(float)),
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=999,
            confidence_level=0.9,
            rng=np.random.default_rng(7),
        ).confidence_interval
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-10)


@pytest.mark.parametrize("effect", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("n_texts", [2, 5, 11, 13])
def test_p_equals_scipys_exact_paired_permutation(n_texts, effect):
    baseline, conditions, tokens = texts(n_texts, seed=n_texts, effect=effect)
    comparison = compare_losses(baseline, conditions[:, 0], tokens)
    expected = stats.permutation_test(
        (baseline * tokens, conditions[:, 0] * tokens),
        lambda baseline, losses, axis: (losses - baseline).sum(axis),
        permutation_type="samples",
        vectorized=True,
    )
    assert comparison.p_exact
    assert comparison.p_value == pytest.approx(expected.pvalue, rel=1e-12)


def test_rounding_does_not_break_ties():
    """Differences in tenths tie like the same integers, although 0.1 + 0.2 is not exactly 0.3."""
    integers = np.random.default_rng(0).integers(-9, 10, (9, 40)).astype(float)
    baseline, n_predicted = np.zeros(9), np.ones(9)
    tenths = compare_conditions(baseline, integers / 10, n_predicted)
    assert [comparison.p_value for comparison in tenths] == [
        comparison.p_value for comparison in compare_conditions(baseline, integers, n_predicted)
    ]


def test_sampled_p_agrees_with_exact_p():
    baseline, conditions, tokens = texts(16, 8, seed=3, effect=0.1)
    exact = compare_conditions(baseline, conditions, tokens, n_permutations=2**16)
    drawn = compare_conditions(baseline, conditions, tokens, n_permutations=2**16 - 1)
    assert [comparison.p_exact for comparison in exact + drawn] == [True] * 8 + [False] * 8
    assert len({comparison.p_value for comparison in exact}) > 4
    for exhaustive, sampled in zip(exact, drawn, strict=True):
        sd = math.sqrt(exhaustive.p_value * (1 - exhaustive.p_value) / 2**16)
        assert abs(exhaustive.p_value - sampled.p_value) < 5 * sd + 2**-15


def test_a_sampled_p_is_never_zero():
    comparison = compare_losses(np.ones(40), np.linspace(5, 6, 40), np.full(40, 100), n_permutations=999)
    assert (comparison.p_value, comparison.p_exact) == (1 / 1000, False)


def test_two_texts_agree_with_hand_computed_values():
    comparison = compare_losses([1.0, 3.0], [2.0, 3.5], [10, 30], lengths=[11, 31], n_resamples=4000)
    assert (comparison.n_texts, comparison.n_predicted) == (2, 40)
    assert (comparison.loss_baseline, comparison.loss, comparison.delta_nats) == (2.5, 3.125, 0.625)
    assert comparison.ppl_baseline == pytest.approx(math.exp(2.5))
    assert comparison.ppl == pytest.approx(math.exp(3.125))
    assert comparison.ratio == pytest.approx(math.exp(0.625))
    # Resamples: only the first text (1 nat), both (0.625), only the second (0.5), in the ratio 1 : 2 : 1.
    assert (comparison.delta_low, comparison.delta_high) == (0.5, 1.0)
    assert (comparison.ci_low, comparison.ci_high) == pytest.approx((math.exp(0.5), math.exp(1.0)))
    # Of the 4 exchanges, two (none and all) are as large as the observed difference.
    assert (comparison.p_value, comparison.p_exact) == (0.5, True)
    # The mean difference, 0.625, divided by its standard deviation, both with weights 1/4 and 3/4.
    variance = 2 / 1 * (0.25 * 0.375**2 + 0.75 * 0.125**2)
    assert comparison.d_z == pytest.approx(0.625 / math.sqrt(variance))
    assert (comparison.rank_biserial, comparison.share_worse) == (1.0, 1.0)
    assert comparison.ppl_baseline_length_weighted == pytest.approx(math.exp((11 * 1 + 31 * 3) / 42))
    assert comparison.ppl_length_weighted == pytest.approx(math.exp((11 * 2 + 31 * 3.5) / 42))
    assert comparison.ratio_length_weighted == pytest.approx(math.exp((11 * 1 + 31 * 0.5) / 42))
    assert comparison.reasons == {}


def test_ranks_and_shares_agree_with_hand_computed_values():
    comparison = compare_losses(np.zeros(5), [1.0, -2.0, 3.0, 0.0, 0.0], np.full(5, 4))
    assert comparison.rank_biserial == pytest.approx((1 - 2 + 3) / 6)
    assert comparison.share_worse == 0.4
    assert comparison.d_z == pytest.approx(0.4 / np.std([1, -2, 3, 0, 0], ddof=1))


def test_rank_biserial_agrees_with_wilcoxons_rank_sum():
    baseline, conditions, tokens = texts(30, effect=0.05)
    difference = (conditions[:, 0] - baseline).round(1)
    comparison = compare_losses(np.zeros(30), difference, tokens)
    n = np.count_nonzero(difference)
    positive = stats.wilcoxon(difference, alternative="greater", method="approx").statistic
    assert comparison.rank_biserial == pytest.approx(2 * positive / (n * (n + 1) / 2) - 1)


def test_the_ratio_is_over_all_tokens_rather_than_a_mean_of_ratios():
    """A short text degrades and a long one does not: the mean of the texts' ratios would be above 60."""
    comparison = compare_losses([2.0, 2.0], [6.8, 2.0], [10, 990])
    assert comparison.ratio == pytest.approx(math.exp(0.048))
    assert comparison.ratio < 1.05 < 60 < np.mean(np.exp([4.8, 0.0]))


@pytest.mark.parametrize("n_texts", [2, 9, 60])
def test_equal_losses_have_exactly_no_effect(n_texts):
    baseline, _, tokens = texts(n_texts)
    comparison = compare_losses(baseline, baseline.copy(), tokens, lengths=tokens + 1)
    assert (comparison.ratio, comparison.ci_low, comparison.ci_high, comparison.ratio_length_weighted) == (
        1.0,
        1.0,
        1.0,
        1.0,
    )
    assert (comparison.delta_nats, comparison.delta_low, comparison.delta_high, comparison.p_value) == (
        0.0,
        0.0,
        0.0,
        1.0,
    )
    assert (comparison.share_worse, comparison.ratio) == (0.0, 1.0)
    assert comparison.reasons == dict.fromkeys(("d_z", "rank_biserial"), "all differences are 0")


def test_equal_differences_of_all_texts_have_no_effect_size():
    """The spread of equal differences of 0.1 is rounding, so an effect in its units is undefined."""
    baseline, _, tokens = texts(12)
    comparison = compare_losses(baseline, baseline + 0.1, tokens, lengths=tokens + 1)
    assert np.std(baseline + 0.1 - baseline) > 0
    assert (comparison.d_z, comparison.rank_biserial) == (None, 1.0)
    assert comparison.reasons == {"d_z": "all texts differ by the same amount, 0.1, up to rounding"}


def test_one_text_has_a_ratio_and_no_spread():
    comparison = compare_losses([2.0], [3.0], [50], lengths=[51])
    assert comparison.ratio == pytest.approx(math.e)
    unknown = {name for name, value in numeric_fields(comparison).items() if value is None}
    assert unknown == {
        "ci_low", "ci_high", "delta_low", "delta_high", "p_value", "p_exact", "d_z", "rank_biserial", "share_worse",
    }  # fmt: skip
    assert comparison.reasons == dict.fromkeys(unknown, "1 text; spread over texts needs at least 2")


def test_texts_without_a_predicted_token_are_omitted():
    expected = compare_losses([2.0, 1.0, 3.0], [2.5, 1.1, 3.0], [5, 6, 7], lengths=[6, 7, 8])
    comparison = compare_losses(
        [2.0, np.nan, 1.0, 3.0], [2.5, np.nan, 1.1, 3.0], [5, 0, 6, 7], lengths=[6, 1, 7, 8]
    )
    assert comparison == expected
    no_comparison = compare_losses([np.nan], [np.nan], [0])
    assert (no_comparison.n_texts, no_comparison.n_predicted, no_comparison.ppl, no_comparison.p_value) == (
        0,
        0,
        None,
        None,
    )
    assert (
        no_comparison.reasons["ratio"]
        == no_comparison.reasons["ppl_baseline"]
        == "no text has a predicted token"
    )


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_affects_only_its_condition(loss):
    baseline, conditions, tokens = texts(9, 3)
    expected = compare_conditions(baseline, conditions, tokens)
    conditions[4, 1] = loss
    comparisons = compare_conditions(baseline, conditions, tokens)
    assert (comparisons[0], comparisons[2]) == (expected[0], expected[2])
    assert (
        comparisons[1].loss,
        comparisons[1].ratio,
        comparisons[1].ci_low,
        comparisons[1].p_value,
        comparisons[1].d_z,
    ) == (None,) * 5
    assert (
        comparisons[1].reasons["ratio"] == "the loss of 1 of 9 texts is NaN or infinite under the condition"
    )
    assert comparisons[1].ppl_baseline == expected[1].ppl_baseline
    baseline[0] = loss
    for comparison in compare_conditions(baseline, conditions, tokens):
        assert (comparison.ppl_baseline, comparison.ratio) == (None, None)
        assert comparison.reasons["ratio"] == "the loss of 1 of 9 texts is NaN or infinite at baseline"
    assert comparison.ppl == expected[2].ppl


def test_nats_remain_where_perplexity_overflows():
    comparison = compare_losses([2.0, 3.0], [22.0, 27.0], [10, 10])
    assert comparison.ratio == pytest.approx(math.exp(22))
    comparison = compare_losses([2.0, 3.0], [2000.0, 3000.0], [10, 10])
    assert (comparison.delta_nats, comparison.loss, comparison.p_value) == (2497.5, 2500.0, 0.5)
    assert (comparison.ratio, comparison.ppl, comparison.ci_low, comparison.ci_high) == (None,) * 4
    assert comparison.reasons["ratio"] == "exp(2497.5) is beyond float64; the exponent, in nats, is known"
    assert (comparison.delta_low, comparison.delta_high) == (1998.0, 2997.0)
    reason = "exp of a resample's nats is beyond float64; delta_low and delta_high are known"
    assert comparison.reasons["ci_high"] == reason
    comparison = compare_losses([800.0, 801.0], [801.0, 802.0], [10, 10])
    assert (comparison.ppl, comparison.ratio) == (None, pytest.approx(math.e))
    assert compare_losses([900.0, 900.0], [0.0, 0.0], [1, 1]).ratio is None, (
        "missing rather than 0 where exp underflows"
    )


def test_conditions_do_not_affect_each_other():
    baseline, conditions, tokens = texts(60, 12)
    comparisons = compare_conditions(baseline, conditions, tokens, lengths=tokens + 1)
    single_comparisons = [
        compare_losses(baseline, column, tokens, lengths=tokens + 1)
        for column in np.ascontiguousarray(conditions.T)
    ]
    reversed_comparisons = compare_conditions(baseline, conditions[:, ::-1], tokens, lengths=tokens + 1)
    assert comparisons == single_comparisons == reversed_comparisons[::-1]


def test_the_same_seed_gives_the_same_numbers():
    baseline, conditions, tokens = texts(30)
    comparison, repeated, reseeded = (
        compare_losses(baseline, conditions[:, 0], tokens, seed=seed) for seed in (1, 1, 2)
    )
    assert comparison == repeated
    assert comparison.ci_low != reseeded.ci_low
    assert comparison.p_value != reseeded.p_value
    assert_same_fields(comparison, reseeded, "ratio", "d_z", "rank_biserial", "ppl")


def test_no_conditions_give_no_comparisons():
    assert compare_conditions([1.0, 2.0], np.empty((2, 0)), [3, 4]) == []


@pytest.mark.slow
def test_intervals_and_p_values_are_calibrated():
    rng = np.random.default_rng(5)
    baseline, tokens = rng.gamma(9.0, 0.35, 40), rng.integers(100, 400, 40)
    noise = rng.normal(scale=0.3, size=(40, 1000))
    comparisons = compare_conditions(
        baseline, baseline[:, None] + 0.1 + noise, tokens, n_resamples=800, n_permutations=1
    )
    covered = np.mean([comparison.delta_low <= 0.1 <= comparison.delta_high for comparison in comparisons])
    assert 0.91 < covered < 0.97
    assert covered == np.mean(
        [comparison.ci_low <= math.exp(0.1) <= comparison.ci_high for comparison in comparisons]
    )
    null = compare_conditions(baseline, baseline[:, None] + noise, tokens, n_resamples=1, n_permutations=999)
    for level in (0.05, 0.5):
        assert np.mean([comparison.p_value <= level for comparison in null]) == pytest.approx(
            level, abs=0.05 * level**0.5 + 0.01
        )


def test_pairing_removes_the_spread_between_texts():
    """Texts differ by nats and the condition adds hundredths, so unpaired arms would overlap."""
    rng = np.random.default_rng(6)
    baseline = rng.gamma(9.0, 0.35, 50)
    comparison = compare_losses(baseline, baseline + 0.03 + rng.normal(scale=0.01, size=50), np.full(50, 200))
    assert 0.02 < comparison.delta_low < comparison.delta_high < 0.04
    assert comparison.p_value < 0.001
    assert comparison.d_z > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": [[1.0], [2.0]]}, r"expected baseline \[text\], received shape \(2, 1\)"),
        ({"conditions": [1.0, 2.0]}, r"expected conditions \[text, condition\], received shape \(2,\)"),
        ({"conditions": [[1.0], [2.0], [3.0]]}, "same texts in all, received baseline of 2, conditions of 3"),
        ({"n_predicted": [5, -1]}, "n_predicted of at least 0, received -1.0 for text 1"),
        ({"n_predicted": [5, np.nan]}, "n_predicted of at least 0, received nan for text 1"),
        ({"n_predicted": [5, 4.5]}, "whole numbers for n_predicted, received 4.5 for text 1"),
        ({"lengths": [6]}, "lengths of 1"),
        ({"lengths": [6, 3]}, "lengths of at least n_predicted"),
        ({"confidence": 95}, "confidence between 0 and 1, received 95"),
        ({"n_resamples": 0}, "n_resamples as a whole number of at least 1, received 0"),
        ({"n_permutations": 0}, "n_permutations as a whole number of at least 1, received 0"),
    ],
)  # fmt: skip
def test_errors_name_the_expected_and_the_received_argument(change, message):
    arguments = {"baseline": [1.0, 2.0], "conditions": [[1.5], [2.0]], "n_predicted": [5, 6]} | change
    with pytest.raises(ValueError, match=message):
        compare_conditions(**arguments)


def test_value_interval_p_and_effect_size_refer_to_one_mean():
    """All refer to the mean over predicted tokens, in which a text is weighted by its length."""
    difference, tokens = np.array([1.0, -0.5, 2.0, 0.25]), np.array([10, 40, 5, 25])
    comparison = compare_losses(np.zeros(4), difference, tokens)
    share = tokens / tokens.sum()
    mean = share @ difference
    assert comparison.delta_nats == pytest.approx(mean)
    assert comparison.d_z == pytest.approx(mean / math.sqrt(4 / 3 * share @ (difference - mean) ** 2))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    assert comparison.p_value == np.mean(np.abs(signs @ (share * difference)) >= abs(mean) - 1e-12)
    resamples = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    means = np.sort((tokens * difference)[resamples].sum(1) / tokens[resamples].sum(1))
    rank = math.ceil(0.025 * len(resamples)) - 1
    assert (comparison.delta_low, comparison.delta_high) == pytest.approx((means[rank], means[-1 - rank]))
    assert (comparison.ci_low, comparison.ci_high) == pytest.approx(
        (math.exp(means[rank]), math.exp(means[-1 - rank]))
    )
    equal = compare_losses(np.zeros(4), difference, np.full(4, 7))
    assert equal.d_z == pytest.approx(difference.mean() / difference.std(ddof=1))


def test_the_interval_of_eight_texts_does_not_depend_on_the_seed():
    baseline, conditions, tokens = texts(8)
    ends = {
        (round(comparison.delta_low, 12), round(comparison.delta_high, 12), round(comparison.ci_high, 12))
        for comparison in (compare_losses(baseline, conditions[:, 0], tokens, seed=seed) for seed in range(5))
    }
    assert len(ends) == 1
