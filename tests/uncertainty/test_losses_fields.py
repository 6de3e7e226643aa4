"""Fields of comparisons that are missing, at the limits of float64, of tiny losses, and of texts that are left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phaselens.uncertainty import compare_arms, compare_conditions, compare_paired
from tests.uncertainty.comparisons import compare_losses

BASELINE, CONDITION = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.5, 3.0])


def test_fields_weighted_by_length_equal_hand_computed_values() -> None:
    lengths = np.array([1, 3, 4])
    comparison = compare_losses(BASELINE, CONDITION, [1, 2, 3], lengths=lengths)
    assert comparison.ppl_baseline_length_weighted == pytest.approx(math.exp((1 + 6 + 16) / 8))
    assert comparison.ppl_length_weighted == pytest.approx(math.exp((2 + 7.5 + 12) / 8))
    assert comparison.ratio_length_weighted == pytest.approx(math.exp((1 + 1.5 - 4) / 8))
    assert comparison.reasons == {}


def test_each_missing_field_has_a_reason_that_names_what_is_missing() -> None:
    without_lengths = compare_losses(BASELINE, CONDITION, [1, 2, 3])
    assert set(without_lengths.reasons) == {
        "ppl_baseline_length_weighted",
        "ppl_length_weighted",
        "ratio_length_weighted",
    }
    assert set(without_lengths.reasons.values()) == {"the lengths of the texts were not given"}
    invalid = compare_losses(BASELINE, [2.0, math.nan, math.inf], [1, 2, 3], lengths=[1, 2, 3])
    assert invalid.ppl_baseline_length_weighted is not None
    for name in (
        "loss",
        "ppl",
        "ppl_length_weighted",
        "ratio",
        "ratio_length_weighted",
        "ci_low",
        "delta_nats",
    ):
        assert getattr(invalid, name) is None
        assert invalid.reasons[name] == "the loss of 2 of 3 texts is NaN or infinite under the condition"
    no_baseline = compare_losses([math.nan, 1, 1], CONDITION, [1, 2, 3], lengths=[1, 2, 3])
    assert no_baseline.loss == pytest.approx(16 / 6)
    for name in (
        "loss_baseline",
        "ppl_baseline",
        "ppl_baseline_length_weighted",
        "ratio",
        "share_worse",
        "p_exact",
    ):
        assert no_baseline.reasons[name] == "the loss of 1 of 3 texts is NaN or infinite at baseline"
    assert compare_losses(BASELINE, CONDITION, [0, 0, 0]).reasons["ratio"] == "no text has a predicted token"
    one_text = compare_losses([1.0], [2.0], [5])
    for name in (
        "ci_low",
        "ci_high",
        "delta_low",
        "delta_high",
        "p_value",
        "p_exact",
        "d_z",
        "rank_biserial",
    ):
        assert getattr(one_text, name) is None
        assert one_text.reasons[name] == "1 text; spread over texts needs at least 2"


@pytest.mark.parametrize("sign", [1, -1])
def test_one_end_beyond_float64_leaves_the_interval_in_nats(sign: int) -> None:
    comparison = compare_losses([0.0, 0.0], [0.0, sign * 800.0], [1, 1])
    assert comparison.ci_low is comparison.ci_high is None
    assert comparison.reasons["ci_low"] == comparison.reasons["ci_high"]
    assert "delta_low" in comparison.reasons["ci_low"]
    assert {comparison.delta_low, comparison.delta_high} == {0.0, sign * 800.0}
    assert comparison.ratio == pytest.approx(math.exp(sign * 400))


def test_effect_sizes_do_not_depend_on_the_size_of_the_losses() -> None:
    tiny = 2.0**-70
    expected = compare_losses(BASELINE, CONDITION, [1, 2, 3])
    assert compare_losses(BASELINE * tiny, CONDITION * tiny, [1, 2, 3]).d_z == pytest.approx(expected.d_z)
    expected_arms = compare_arms(BASELINE, CONDITION[:, None])
    assert compare_arms(BASELINE * tiny, CONDITION[:, None] * tiny).d_z == pytest.approx(expected_arms.d_z)
    (many,) = compare_paired(CONDITION[:, None] * tiny, BASELINE[:, None] * tiny)
    assert many.d_z == pytest.approx(expected_arms.d_z)


def test_equal_differences_up_to_rounding_have_no_effect_size_whichever_arm_is_large() -> None:
    """0.1 is lost in part beside 1e15, so that equal differences seem to vary."""
    for baseline in ([1e15, 0.0, 3.0], [0.1, 0.3, 0.7]):
        condition = np.asarray(baseline) + 0.1
        for comparison in (
            compare_losses(baseline, condition, [1, 1, 1]),
            compare_losses(condition, baseline, [1, 1, 1]),
            compare_arms(baseline, condition[:, None]),
            compare_arms(condition, np.asarray(baseline)[:, None]),
        ):
            assert comparison.d_z is None
            assert "by the same amount" in comparison.reasons["d_z"]


def test_texts_without_tokens_are_left_out_of_arms() -> None:
    arms = compare_arms([1.0, 50.0, 3.0], [[0.0], [7.0], [1.0]], n_predicted=[1, 0, 3])
    assert (arms.n_texts, arms.n_seeds) == (2, 1)
    assert arms.difference == pytest.approx(1.75)
    assert arms == compare_arms([1.0, 3.0], [[0.0], [1.0]], n_predicted=[1, 3])
    assert "1 seed" in arms.reasons["control_sd_over_seeds"]


def test_conditions_without_texts_or_with_some_invalid_keep_their_order() -> None:
    conditions = np.stack([CONDITION, np.full(3, np.nan), BASELINE], axis=1)
    first, second, third = compare_conditions(BASELINE, conditions, [1, 1, 1])
    assert first.delta_nats == pytest.approx(0.5 / 3)
    assert second.delta_nats is None
    assert third.delta_nats == 0
    assert third.reasons["d_z"] == third.reasons["rank_biserial"] == "all differences are 0"
