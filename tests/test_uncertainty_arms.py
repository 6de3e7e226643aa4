"""Massive against random, text by text: seeds of a control are no sample of texts."""

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

from phaselens.uncertainty import compare_arms, compare_losses

STORED = json.loads((Path(__file__).parent / "data" / "goldens" / "disruption.json").read_text())


def effect_over_seeds(treated: float, control: np.ndarray) -> float:
    """The published way, n = seeds: the treated arm is one number, repeated beside each seed's control."""
    difference = treated - control
    return float(difference.mean() / difference.std())


def arms(n_texts: int, n_seeds: int, noise: float = 0.05, seed: int = 0):
    """treated [text], control [text, seed]; `noise` is what the seed alone does to the control."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(9.0, 0.35, n_texts)
    treated = base + rng.normal(0.5, 0.4, n_texts)
    return treated, base[:, None] + noise * rng.normal(size=(n_texts, n_seeds))


@pytest.mark.parametrize("model", ["RoPE", "DroPE"])
def test_the_published_effect_size_is_the_noise_of_its_control(model):
    trials, stored = STORED["results"][model]["trials"], STORED["results"][model]["stats"]
    massive = np.array([trial["massive_increase_pct"] for trial in trials])
    random = np.array([trial["random_increase_pct"] for trial in trials])
    assert len(set(massive.tolist())) == 1, "ten seeds, and one number ten times"
    assert effect_over_seeds(massive[0], random) == pytest.approx(stored["cohens_d"], rel=1e-9)
    paired = stats.ttest_1samp(massive - random, 0)
    assert (paired.statistic, paired.pvalue) == pytest.approx(
        (stored["t_statistic"], stored["p_value"]), rel=1e-6
    )
    # The spread it divides by is the control's alone: a control half as noisy doubles it, whatever was disrupted.
    assert (massive - random).std() == pytest.approx(random.std(), rel=1e-9)
    quiet = random.mean() + (random - random.mean()) / 2
    assert effect_over_seeds(massive[0], quiet) == pytest.approx(2 * stored["cohens_d"], rel=1e-6)

    # Text by text it is one text set, of which no spread is known.
    found = compare_arms(np.log([trials[0]["massive"]]), np.log([[trial["random"] for trial in trials]]))
    assert (found.n_texts, found.n_seeds) == (1, 10)
    assert (found.d_z, found.p_value, found.ci_low) == (None, None, None)
    assert found.reasons["p_value"] == "1 text; spread over texts needs at least 2"
    assert found.control_sd_over_seeds == pytest.approx(np.std(np.log([t["random"] for t in trials]), ddof=1))


@pytest.mark.parametrize("model", ["RoPE", "DroPE"])
def test_published_differences_of_the_three_text_sets(model):
    sets = STORED["results"][model]["by_eval_set"]
    massive, random = (
        np.array([each[f"{arm}_increase_pct"] for each in sets.values()]) for arm in ("massive", "random")
    )
    want = [each[f"{model}_M_minus_R"] for each in STORED["by_eval_set_recomputed"].values()]
    found = compare_arms(massive, random[:, None], n_resamples=4000)
    assert found.difference == pytest.approx(np.mean(want), rel=1e-9)
    assert (found.ci_low, found.ci_high) == pytest.approx((min(want), max(want)), rel=1e-9)
    assert found.p_value == 0.25, "three texts cannot give less"
    assert found.d_z == pytest.approx(np.mean(want) / np.std(want, ddof=1), rel=1e-9)


def test_repeating_seeds_adds_nothing():
    treated, control = arms(20, 3)
    once = dataclasses.asdict(compare_arms(treated, control))
    many = dataclasses.asdict(compare_arms(treated, np.tile(control, (1, 50))))
    assert (once.pop("n_seeds"), many.pop("n_seeds")) == (3, 150)
    assert once.pop("control_sd_over_seeds") != many.pop("control_sd_over_seeds")
    for name, value in once.items():
        assert many[name] == pytest.approx(value, rel=1e-9), name
    # What is built on seeds grows without end: t of 150 "trials" is about 7 times that of 3.
    t = [
        stats.ttest_1samp(treated.mean() - each.mean(0), 0).statistic
        for each in (control, np.tile(control, (1, 50)))
    ]
    assert t[1] > 7 * t[0]


def test_a_quieter_control_leaves_the_effect_where_the_texts_put_it():
    treated, control = arms(200, 10, noise=0.2)
    centre = control.mean(1, keepdims=True)
    loud, quiet = compare_arms(treated, control), compare_arms(treated, centre + (control - centre) / 100)
    assert quiet.d_z == pytest.approx(loud.d_z, rel=1e-9)
    assert effect_over_seeds(treated.mean(), (centre + (control - centre) / 100).mean(0)) == pytest.approx(
        100 * effect_over_seeds(treated.mean(), control.mean(0)), rel=1e-6
    )


def test_seeds_are_averaged_within_each_text_first():
    found = compare_arms([2.0, 5.0, 3.0], [[1.0, 2.0], [1.0, 3.0], [2.0, 5.0]])
    assert found.difference == pytest.approx(np.mean([0.5, 3.0, -0.5]))
    assert (found.treated, found.control) == pytest.approx((10 / 3, 7 / 3))
    assert found.d_z == pytest.approx(1.0 / np.std([0.5, 3.0, -0.5], ddof=1))
    assert found.rank_biserial == pytest.approx((1.5 + 3 - 1.5) / 6)
    assert found.share_above == pytest.approx(2 / 3)
    # Sums of ±0.5 ±3 ±0.5: 3.0, as seen, or more in 6 of 8.
    assert found.p_value == 0.75
    assert found.control_sd_over_seeds == pytest.approx(np.std([4 / 3, 10 / 3], ddof=1))


def test_against_one_control_it_is_the_comparison_of_losses():
    treated, control = arms(30, 1)
    tokens = np.random.default_rng(3).integers(0, 50, 30)
    found = compare_arms(treated, control, n_predicted=tokens, seed=4)
    want = compare_losses(control[:, 0], treated, tokens, seed=4)
    assert (found.difference, found.ci_low, found.ci_high) == (
        want.delta_nats,
        want.delta_low,
        want.delta_high,
    )
    assert (found.p_value, found.d_z, found.n_texts) == (want.p_value, want.d_z, want.n_texts)
    assert (found.treated, found.control, found.share_above) == (
        want.loss,
        want.loss_baseline,
        want.share_worse,
    )
    assert found.reasons == {"control_sd_over_seeds": "1 seed; spread over seeds needs at least 2"}


def test_the_baseline_cancels_in_nats():
    treated, control = arms(15, 4)
    baseline = np.random.default_rng(8).integers(0, 40, 15) / 8
    plain, less = (
        compare_arms(treated, control),
        compare_arms(treated - baseline, control - baseline[:, None]),
    )
    assert (less.difference, less.ci_low, less.p_value, less.d_z) == pytest.approx(
        (plain.difference, plain.ci_low, plain.p_value, plain.d_z), rel=1e-9
    )


def test_an_arm_like_its_control_shows_nothing():
    """Both drawn alike: p as rare as it says, and the true difference, 0, in 95 % of the intervals."""
    rng = np.random.default_rng(9)
    small, covered = [], []
    for _ in range(300):
        base = rng.gamma(9.0, 0.35, 25)
        each = base[:, None] + rng.normal(scale=0.2, size=(25, 6))
        found = compare_arms(each[:, 0], each[:, 1:], n_resamples=400, n_permutations=400)
        small.append(found.p_value <= 0.1)
        covered.append(found.ci_low <= 0 <= found.ci_high)
    assert 0.05 < np.mean(small) < 0.16
    assert 0.88 < np.mean(covered) < 0.98


def test_equal_arms_differ_by_nothing():
    treated, _ = arms(8, 1)
    found = compare_arms(treated, np.repeat(treated[:, None], 3, axis=1))
    assert (found.difference, found.ci_low, found.ci_high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert found.reasons == dict.fromkeys(("d_z", "rank_biserial"), "all differences are 0")


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 4), st.integers(0, 3))
def test_whatever_is_none_has_a_reason(data, n_texts, n_seeds):
    values = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0]))
    treated = data.draw(arrays.arrays(np.float64, n_texts, elements=values))
    control = data.draw(arrays.arrays(np.float64, (n_texts, n_seeds), elements=values))
    found = dataclasses.asdict(compare_arms(treated, control, n_resamples=20))
    reasons = found.pop("reasons")
    assert {name for name, value in found.items() if value is None} == set(reasons)
    assert all(math.isfinite(value) for value in found.values() if value is not None)


@pytest.mark.parametrize(
    ("treated", "control", "why"),
    [
        ([1.0, np.inf], [[1.0], [2.0]], "a value of 1 of 2 texts is NaN or infinite"),
        ([1.0, 2.0], [[1.0, 1.0], [2.0, np.nan]], "a value of 1 of 2 texts is NaN or infinite"),
        ([1.0, 2.0], np.empty((2, 0)), "the control has no seed"),
        ([], np.empty((0, 3)), "there is no text"),
    ],
)
def test_what_cannot_be_compared_says_why(treated, control, why):
    found = compare_arms(treated, control)
    assert found.difference is None
    assert found.reasons["difference"] == why


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected control \[text, seed\], received shape \(2,\)"):
        compare_arms([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same texts in all, received treated of 2, control of 3"):
        compare_arms([1.0, 2.0], [[1.0], [2.0], [3.0]])
