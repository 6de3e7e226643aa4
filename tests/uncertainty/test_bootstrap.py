"""Bootstrap over texts: agreement with scipy, missing values and the coverage of intervals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from phaselens.uncertainty import _bootstrap, mean_interval, paired_interval


def test_the_interval_equals_scipys_percentile_bootstrap_of_the_same_draws():
    values = np.random.default_rng(1).gamma(1.0, size=12)
    mean, low, high = mean_interval(values, seed=7, n_resamples=999, confidence=0.9)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=999,
        confidence_level=0.9,
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert float(mean) == pytest.approx(values.mean(), rel=1e-12)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_a_cell_does_not_depend_on_the_other_cells():
    values = np.random.default_rng(2).normal(size=(9, 3, 4))
    table_interval = mean_interval(values, n_resamples=200)
    for index in np.ndindex(3, 4):
        cell_interval = mean_interval(values[:, *index], n_resamples=200)
        assert [float(estimate[index]) for estimate in table_interval] == pytest.approx(
            [float(estimate) for estimate in cell_interval], rel=1e-12
        )


def test_a_missing_value_removes_its_text_from_the_cell():
    values = np.random.default_rng(3).normal(size=(8, 3))
    present = np.ones((8, 3), bool)
    present[[1, 4], 1] = False
    present[1:, 2] = False
    values_with_nan = np.where(present, values, np.nan)
    mean, low, high = mean_interval(values_with_nan, present=present, n_resamples=300)
    expected = mean_interval(values[present[:, 1], 1], n_resamples=300)
    assert [float(estimate[1]) for estimate in (mean, low, high)] == pytest.approx(
        [float(estimate) for estimate in expected], rel=1e-12
    )
    assert mean.tolist()[2] == values[0, 2]
    assert low.tolist()[2] is None
    assert high.tolist()[2] is None


def test_a_cell_without_texts_is_missing():
    mean, low, high = mean_interval(np.zeros((3, 2)), present=np.zeros((3, 2), bool))
    assert mean.tolist() == low.tolist() == high.tolist() == [None, None]
    assert [estimate.tolist() for estimate in mean_interval(np.empty((0, 2)))] == [[None, None]] * 3


def test_equal_texts_give_an_interval_of_width_zero():
    mean, low, high = mean_interval(np.full((11, 5), 0.1))
    assert (low == high).all()
    assert (low == mean).all()
    assert mean.tolist() == [0.1] * 5


def test_nan_and_infinity_are_refused_and_counted():
    with pytest.raises(ValueError, match="2 of 3 values are NaN or infinite"):
        mean_interval([0.0, np.nan, np.inf])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": 3.0}, "received a single number"),
        (
            {"values": [1.0, 2.0], "present": [True]},
            r"expected present of the values' shape \(2,\), received \(1,\)",
        ),
        ({"values": [1.0], "confidence": 1.0}, "confidence between 0 and 1, received 1.0"),
        ({"values": [1.0], "n_resamples": 0}, "n_resamples as a whole number of at least 1, received 0"),
    ],
)
def test_errors_name_the_expected_and_the_received_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(**arguments)


def test_a_transformed_mean_has_the_interval_of_the_transform():
    values = np.random.default_rng(4).uniform(size=(20, 6))

    def share(means):
        return (means >= 0.5).mean(-1)

    rate, low, high = mean_interval(values, transform=share, n_resamples=500)
    draws = np.random.default_rng(0).integers(0, 20, (500, 20))
    expected = np.quantile(share(values[draws].mean(1)), (0.025, 0.975))
    assert float(rate) == share(values.mean(0))
    assert [float(low), float(high)] == pytest.approx(expected.tolist())


def test_a_transform_omits_empty_texts_and_refuses_incomplete_ones():
    values, present = np.arange(6.0).reshape(3, 2), np.ones((3, 2), bool)
    present[1] = False
    expected = mean_interval(values[[0, 2]], transform=lambda m: m.sum(-1))
    interval = mean_interval(values, present=present, transform=lambda m: m.sum(-1))
    assert [float(estimate) for estimate in interval] == [float(estimate) for estimate in expected]
    present[1, 0] = True
    message = "1 of 3 texts have some values missing; a transformed mean needs all values of a text or none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        mean_interval(values, present=present, transform=lambda m: m.sum(-1))


def test_pairing_removes_the_spread_that_both_arms_share():
    rng = np.random.default_rng(5)
    text = rng.normal(scale=10.0, size=30)
    treated, control = text + 0.5 + rng.normal(scale=0.05, size=30), text
    mean, low, high = paired_interval(treated, control)
    assert 0.45 < float(low) < float(mean) < float(high) < 0.55
    unpaired = mean_interval(treated)
    assert float(unpaired[2] - unpaired[1]) > 3.0


def test_paired_differences_use_texts_present_in_both_arms():
    mean, low, _ = paired_interval([1.0, 5.0, np.nan], [0.0, np.nan, 1.0], present=[True, False, False])
    assert (mean.tolist(), low.tolist()) == (1.0, None)
    with pytest.raises(ValueError, match=r"received \(2,\) and \(3,\)"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_intervals_have_nearly_their_nominal_coverage():
    rng = np.random.default_rng(6)
    values = rng.normal(loc=1.0, size=(40, 1500))
    _, low, high = mean_interval(values, n_resamples=600)
    covered = ((low <= 1.0) & (high >= 1.0)).mean()
    assert 0.91 < covered < 0.96


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(-50, 50), st.floats(0.01, 20))
def test_intervals_shift_and_scale_with_the_values(n_texts, seed, shift, factor):
    values = np.random.default_rng(seed).normal(size=n_texts)
    interval = mean_interval(values, n_resamples=100)
    moved_interval = mean_interval(values * factor + shift, n_resamples=100)
    assert [float(estimate) * factor + shift for estimate in interval] == pytest.approx(
        [float(estimate) for estimate in moved_interval], abs=1e-9
    )


def test_the_mean_ignores_the_order_of_texts_and_seeds_are_repeatable():
    values = np.random.default_rng(8).normal(size=(15, 2))
    assert mean_interval(values)[1].tolist() == mean_interval(values)[1].tolist()
    assert mean_interval(values, seed=1)[1].tolist() != mean_interval(values, seed=2)[1].tolist()
    assert mean_interval(values[::-1])[0].tolist() == pytest.approx(
        mean_interval(values)[0].tolist(), rel=1e-12
    )


@pytest.mark.slow
def test_a_cell_of_a_large_table_has_the_interval_that_it_has_alone():
    values = np.random.default_rng(9).normal(size=(100, 32, 32))
    together = mean_interval(values)
    for cell in ((0, 0), (7, 31), (31, 31)):
        alone = mean_interval(values[:, *cell])
        np.testing.assert_allclose(together[0][cell], alone[0], rtol=1e-12)
        np.testing.assert_allclose(together[1][cell], alone[1], rtol=1e-12)


@pytest.mark.parametrize("n_texts", [2, 3, 5])
def test_the_interval_of_few_texts_is_over_all_their_resamples(n_texts):
    """The reference enumerates all n^n ordered draws."""
    values = np.random.default_rng(n_texts).gamma(1.0, size=(n_texts, 4))
    resamples = np.array(list(itertools.product(range(n_texts), repeat=n_texts)))
    means = np.sort(values[resamples].mean(1), axis=0)
    _, low, high = mean_interval(values)
    # The smallest mean that at least 2.5 % of the draws do not exceed, and its mirror image.
    rank = int(np.ceil(0.025 * len(resamples))) - 1
    assert low.tolist() == pytest.approx(means[rank].tolist())
    assert high.tolist() == pytest.approx(means[len(resamples) - 1 - rank].tolist())


def test_seed_and_order_do_not_move_the_interval_of_eight_texts():
    values = np.random.default_rng(8).gamma(0.5, size=(8, 3))
    interval = mean_interval(values)
    rng = np.random.default_rng(0)
    for seed in range(1, 6):
        reordered = mean_interval(values[rng.permutation(8)], seed=seed)
        assert [estimate.tolist() for estimate in reordered] == [
            pytest.approx(estimate.tolist()) for estimate in interval
        ]
    rates = [
        mean_interval(values, transform=lambda mean: (mean > 0.5).mean(-1), seed=seed) for seed in (0, 1)
    ]
    assert [float(estimate) for estimate in rates[0]] == [float(estimate) for estimate in rates[1]]


def test_all_resamples_agree_with_many_draws():
    values = np.random.default_rng(9).gamma(1.0, size=(7, 5))
    exact, drawn = mean_interval(values), mean_interval(values, n_resamples=1715)  # one fewer than all 1,716
    spread = values.std(0, ddof=1) / np.sqrt(7)
    for exact_bound, drawn_bound in zip(exact[1:], drawn[1:], strict=True):
        assert (np.abs(exact_bound - drawn_bound) < 0.3 * spread).all()
        assert (exact_bound != drawn_bound).any()


def test_seeds_move_the_bounds_of_many_texts_by_the_documented_share():
    """The standard deviation over seeds is 1.4 % of half the interval's width."""
    values = np.random.default_rng(10).normal(size=(40, 30))
    ends = np.array(
        [[bound.tolist() for bound in mean_interval(values, seed=seed)[1:]] for seed in range(12)]
    )
    half = (ends[:, 1] - ends[:, 0]).mean(0) / 2
    share = ends.std(0, ddof=1) / half
    assert 0.010 < share.mean() < 0.018


def test_the_help_of_an_interval_describes_the_resamples():
    from phaselens.plugin import interval_help
    from phaselens.uncertainty import N_RESAMPLES
    from phaselens.uncertainty._bootstrap import resamples

    assert f"else {N_RESAMPLES:,} drawn with the seed" in interval_help()
    assert "all resamples of up to 8" in interval_help()
    assert resamples(8, N_RESAMPLES, 0).probabilities is not None
    assert resamples(9, N_RESAMPLES, 0).probabilities is None
    assert interval_help("prompts", paired=True).startswith(
        "95 % interval, paired percentile bootstrap over prompts"
    )


@given(st.integers(2, 8))
@settings(max_examples=7, deadline=None)
def test_the_resamples_of_few_texts_are_complete_and_distinct(n_texts):
    from phaselens.uncertainty._bootstrap import resamples

    distinct = resamples(n_texts, 10_000, 0)
    assert distinct.counts.shape == (math.comb(2 * n_texts - 1, n_texts), n_texts)
    assert (distinct.counts.sum(1) == n_texts).all()
    assert len({tuple(row) for row in distinct.counts.tolist()}) == len(distinct.counts)
    assert distinct.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert distinct.probabilities @ distinct.counts == pytest.approx(np.ones(n_texts))


def test_draws_do_not_depend_on_the_block_size(monkeypatch):
    from phaselens.uncertainty import _bootstrap

    expected = _bootstrap.draws(11, 100, 3)
    monkeypatch.setattr(_bootstrap, "_MAX_DRAWN", 70)
    assert (expected == _bootstrap.draws(11, 100, 3)).all()


def test_many_texts_are_drawn_again_instead_of_held(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(300, 3))
    held = mean_interval(values, n_resamples=500, seed=3)
    monkeypatch.setattr(_bootstrap, "_MAX_COUNTS", 1000)
    monkeypatch.setattr(_bootstrap, "_MAX_DRAWN", 3000)
    redrawn = mean_interval(values, n_resamples=500, seed=3)
    for one, other in zip(held, redrawn, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    share = {"transform": lambda mean: (mean > 0).mean(-1)}
    assert mean_interval(values, n_resamples=500, **share)[0] == held_share(values)  # type: ignore[arg-type]


def held_share(values: np.ndarray) -> float:
    return float((values.mean(0) > 0).mean())
