"""Massive against random disruption per text: the seeds of a control are not a sample of texts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from phaselens.uncertainty import compare_arms
from tests.uncertainty.comparisons import compare_losses

STORED = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "disruption.json").read_text())


def effect_over_seeds(treated: float, control: np.ndarray) -> float:
    """Published effect size with n = seeds: one number for the treated arm, compared with the control of each seed."""
    difference = treated - control
    return float(difference.mean() / difference.std())


def arms(n_texts: int, n_seeds: int, noise: float = 0.05, seed: int = 0):
    """treated [text], control [text, seed]; `noise` is the standard deviation of the control over seeds."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(9.0, 0.35, n_texts)
    treated = base + rng.normal(0.5, 0.4, n_texts)
    return treated, base[:, None] + noise * rng.normal(size=(n_texts, n_seeds))


@pytest.mark.parametrize("model", ["RoPE", "DroPE"])
def test_the_published_effect_size_depends_only_on_the_noise_of_the_control(model):
    trials, stored = STORED["results"][model]["trials"], STORED["results"][model]["stats"]
    massive = np.array([trial["massive_increase_pct"] for trial in trials])
    random = np.array([trial["random_increase_pct"] for trial in trials])
    assert len(set(massive.tolist())) == 1, "one number, repeated for ten seeds"
    assert effect_over_seeds(massive[0], random) == pytest.approx(stored["cohens_d"], rel=1e-9)
    paired = stats.ttest_1samp(massive - random, 0)
    assert (paired.statistic, paired.pvalue) == pytest.approx(
        (stored["t_statistic"], stored["p_value"]), rel=1e-6
    )
    # It divides by the spread of the control alone: half the noise doubles it, whatever was disrupted.
    assert (massive - random).std() == pytest.approx(random.std(), rel=1e-9)
    quiet = random.mean() + (random - random.mean()) / 2
    assert effect_over_seeds(massive[0], quiet) == pytest.approx(2 * stored["cohens_d"], rel=1e-6)

    # Per text there is one text set, whose spread is undefined.
    comparison = compare_arms(np.log([trials[0]["massive"]]), np.log([[trial["random"] for trial in trials]]))
    assert (comparison.n_texts, comparison.n_seeds) == (1, 10)
    assert (comparison.d_z, comparison.p_value, comparison.ci_low) == (None, None, None)
    assert comparison.reasons["p_value"] == "1 text; spread over texts needs at least 2"
    assert comparison.control_sd_over_seeds == pytest.approx(
        np.std(np.log([t["random"] for t in trials]), ddof=1)
    )


@pytest.mark.parametrize("model", ["RoPE", "DroPE"])
def test_the_published_differences_of_three_text_sets_are_reproduced(model):
    sets = STORED["results"][model]["by_eval_set"]
    massive, random = (
        np.array([text_set[f"{arm}_increase_pct"] for text_set in sets.values()])
        for arm in ("massive", "random")
    )
    expected = [text_set[f"{model}_M_minus_R"] for text_set in STORED["by_eval_set_recomputed"].values()]
    comparison = compare_arms(massive, random[:, None], n_resamples=4000)
    assert comparison.difference == pytest.approx(np.mean(expected), rel=1e-9)
    assert (comparison.ci_low, comparison.ci_high) == pytest.approx((min(expected), max(expected)), rel=1e-9)
    assert comparison.p_value == 0.25, "three texts cannot give a smaller p"
    assert comparison.d_z == pytest.approx(np.mean(expected) / np.std(expected, ddof=1), rel=1e-9)


def test_repeated_seeds_add_no_evidence():
    treated, control = arms(20, 3)
    once = dataclasses.asdict(compare_arms(treated, control))
    many = dataclasses.asdict(compare_arms(treated, np.tile(control, (1, 50))))
    assert (once.pop("n_seeds"), many.pop("n_seeds")) == (3, 150)
    assert once.pop("control_sd_over_seeds") != many.pop("control_sd_over_seeds")
    for name, value in once.items():
        assert many[name] == pytest.approx(value, rel=1e-9), name
    # A statistic over seeds grows without bound: t of 150 "trials" is about 7 times that of 3.
    t = [
        stats.ttest_1samp(treated.mean() - control_arm.mean(0), 0).statistic
        for control_arm in (control, np.tile(control, (1, 50)))
    ]
    assert t[1] > 7 * t[0]


def test_noise_between_seeds_does_not_change_the_effect_size():
    treated, control = arms(200, 10, noise=0.2)
    centre = control.mean(1, keepdims=True)
    loud, quiet = compare_arms(treated, control), compare_arms(treated, centre + (control - centre) / 100)
    assert quiet.d_z == pytest.approx(loud.d_z, rel=1e-9)
    assert effect_over_seeds(treated.mean(), (centre + (control - centre) / 100).mean(0)) == pytest.approx(
        100 * effect_over_seeds(treated.mean(), control.mean(0)), rel=1e-6
    )


def test_seeds_are_averaged_within_each_text():
    comparison = compare_arms([2.0, 5.0, 3.0], [[1.0, 2.0], [1.0, 3.0], [2.0, 5.0]])
    assert comparison.difference == pytest.approx(np.mean([0.5, 3.0, -0.5]))
    assert (comparison.treated, comparison.control) == pytest.approx((10 / 3, 7 / 3))
    assert comparison.d_z == pytest.approx(1.0 / np.std([0.5, 3.0, -0.5], ddof=1))
    assert comparison.rank_biserial == pytest.approx((1.5 + 3 - 1.5) / 6)
    assert comparison.share_above == pytest.approx(2 / 3)
    # Of the 8 sums ±0.5 ±3 ±0.5, 6 are at least as large as the observed 3.0.
    assert comparison.p_value == 0.75
    assert comparison.control_sd_over_seeds == pytest.approx(np.std([4 / 3, 10 / 3], ddof=1))


def test_one_control_seed_gives_the_comparison_of_losses():
    treated, control = arms(30, 1)
    tokens = np.random.default_rng(3).integers(0, 50, 30)
    comparison = compare_arms(treated, control, n_predicted=tokens, seed=4)
    expected = compare_losses(control[:, 0], treated, tokens, seed=4)
    assert (comparison.difference, comparison.ci_low, comparison.ci_high) == (
        expected.delta_nats,
        expected.delta_low,
        expected.delta_high,
    )
    assert (comparison.p_value, comparison.d_z, comparison.n_texts) == (
        expected.p_value,
        expected.d_z,
        expected.n_texts,
    )
    assert (comparison.treated, comparison.control, comparison.share_above) == (
        expected.loss,
        expected.loss_baseline,
        expected.share_worse,
    )
    assert comparison.reasons == {"control_sd_over_seeds": "1 seed; spread over seeds needs at least 2"}


def test_differences_in_nats_do_not_depend_on_the_baseline():
    treated, control = arms(15, 4)
    baseline = np.random.default_rng(8).integers(0, 40, 15) / 8
    of_losses, of_increases = (
        compare_arms(treated, control),
        compare_arms(treated - baseline, control - baseline[:, None]),
    )
    assert (
        of_increases.difference,
        of_increases.ci_low,
        of_increases.p_value,
        of_increases.d_z,
    ) == pytest.approx((of_losses.difference, of_losses.ci_low, of_losses.p_value, of_losses.d_z), rel=1e-9)


def test_arms_of_one_distribution_show_no_effect():
    """Small p values are as rare as they should be, and 95 % of the intervals contain the true difference, 0."""
    rng = np.random.default_rng(9)
    rejected, covered = [], []
    for _ in range(300):
        base = rng.gamma(9.0, 0.35, 25)
        arm_losses = base[:, None] + rng.normal(scale=0.2, size=(25, 6))
        comparison = compare_arms(arm_losses[:, 0], arm_losses[:, 1:], n_resamples=400, n_permutations=400)
        rejected.append(comparison.p_value <= 0.1)
        covered.append(comparison.ci_low <= 0 <= comparison.ci_high)
    assert 0.05 < np.mean(rejected) < 0.16
    assert 0.88 < np.mean(covered) < 0.98


def test_equal_arms_have_no_difference():
    treated, _ = arms(8, 1)
    comparison = compare_arms(treated, np.repeat(treated[:, None], 3, axis=1))
    assert (comparison.difference, comparison.ci_low, comparison.ci_high, comparison.p_value) == (
        0.0,
        0.0,
        0.0,
        1.0,
    )
    assert comparison.reasons == dict.fromkeys(("d_z", "rank_biserial"), "all differences are 0")


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 4), st.integers(0, 3))
def test_every_missing_value_has_a_reason(data, n_texts, n_seeds):
    values = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0]))
    treated = data.draw(arrays.arrays(np.float64, n_texts, elements=values))
    control = data.draw(arrays.arrays(np.float64, (n_texts, n_seeds), elements=values))
    fields = dataclasses.asdict(compare_arms(treated, control, n_resamples=20))
    reasons = fields.pop("reasons")
    assert {name for name, value in fields.items() if value is None} == set(reasons)
    assert all(math.isfinite(value) for value in fields.values() if value is not None)


@pytest.mark.parametrize(
    ("treated", "control", "reason"),
    [
        ([1.0, np.inf], [[1.0], [2.0]], "a value of 1 of 2 texts is NaN or infinite"),
        ([1.0, 2.0], [[1.0, 1.0], [2.0, np.nan]], "a value of 1 of 2 texts is NaN or infinite"),
        ([1.0, 2.0], np.empty((2, 0)), "the control has no seeds"),
        ([], np.empty((0, 3)), "there are no texts"),
    ],
)
def test_an_undefined_comparison_has_a_reason(treated, control, reason):
    comparison = compare_arms(treated, control)
    assert comparison.difference is None
    assert comparison.reasons["difference"] == reason


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected control \[text, seed\], received shape \(2,\)"):
        compare_arms([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same texts in all, received treated of 2, control of 3"):
        compare_arms([1.0, 2.0], [[1.0], [2.0], [3.0]])
