"""Bootstrap intervals of transformed means, of masked texts and of many blocks of draws."""

from __future__ import annotations

import numpy as np
import pytest

from phaselens.uncertainty import _bootstrap, _paired, compare_paired, mean_interval, paired_interval
from phaselens.uncertainty._bootstrap import resamples

TABLE = np.random.default_rng(5).normal(size=(12, 2, 3))


@pytest.mark.parametrize("n_texts", [5, 12])
def test_a_transform_may_return_other_cells_and_types(n_texts: int) -> None:
    """The interval of a threshold is the threshold of the interval, of which each end is True or False."""
    values = TABLE[:n_texts]
    mean, low, high = mean_interval(values, transform=lambda means: means[..., 0, :2] > 0.1)
    assert mean.shape == low.shape == high.shape == (2,)
    assert mean.tolist() == (values.mean(0)[0, :2] > 0.1).astype(float).tolist()
    for end, expected in zip((low, high), mean_interval(values)[1:], strict=True):
        assert end.tolist() == (expected[0, :2] > 0.1).astype(float).tolist()


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.5, 0.76, 1 - 1e-9, 1.0])
def test_quantiles_are_numpys(n: int, share: float) -> None:
    values = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(
        _bootstrap._quantile(values, share), np.quantile(values, share, axis=-1), rtol=1e-12
    )


def test_values_that_are_no_numbers_are_counted_with_what_to_do() -> None:
    message = "2 of 5 values are NaN or infinite; mark them as not present, and report the reason"
    with pytest.raises(ValueError, match=f"^{message}$"):
        mean_interval([1.0, np.nan, 2.0, np.inf, np.nan, 3.0], present=[True] * 4 + [False, True])


def test_the_identity_transforms_nothing() -> None:
    for estimate, expected in zip(
        mean_interval(TABLE, transform=lambda means: means), mean_interval(TABLE), strict=True
    ):
        np.testing.assert_allclose(estimate, expected, rtol=1e-12)


def test_a_transform_of_one_text_or_none_has_no_interval() -> None:
    for n_texts in (0, 1):
        mean, low, high = mean_interval(TABLE[:n_texts], transform=lambda means: means.max((-1, -2)))
        assert mean.tolist() == (TABLE[0].max() if n_texts else None)
        assert low.tolist() is high.tolist() is None
    mean, low, high = mean_interval(TABLE[:1], transform=lambda means: means[..., 0, :])
    assert mean.tolist() == TABLE[0, 0].tolist()
    assert low.tolist() == high.tolist() == [None] * 3


def test_a_cell_without_a_text_leaves_the_others_as_they_are() -> None:
    present = np.ones(TABLE.shape, dtype=bool)
    present[:, 1, 0] = False
    mean, low, high = mean_interval(TABLE, present=present)
    for estimate, expected in zip((mean, low, high), mean_interval(TABLE), strict=True):
        assert estimate[1, 0] is np.ma.masked
        has_texts = present[0]
        assert estimate[has_texts].tolist() == pytest.approx(expected[has_texts].tolist(), rel=1e-12)


def test_a_transform_is_not_called_without_texts() -> None:
    def pair(means: np.ndarray) -> np.ndarray:
        assert len(means)
        return means[..., 0, :2]

    assert [np.shape(estimate) for estimate in mean_interval(TABLE[:0], transform=pair)] == [()] * 3


def test_what_is_not_present_may_hold_anything() -> None:
    first, second = TABLE[:, 0, 0].copy(), TABLE[:, 0, 1].copy()
    expected = paired_interval(first[2:], second[2:])
    first[:2], second[:2] = np.inf, [np.inf, np.nan]
    assert paired_interval(first, second, present=[False] * 2 + [True] * 10) == expected


def test_statistics_do_not_depend_on_the_sizes_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = TABLE[:, 0].repeat(2, 0), TABLE[:, 1].repeat(2, 0)
    options = {"n_resamples": 500, "n_permutations": 300}
    comparisons = compare_paired(first, second, **options)
    intervals = [np.asarray(estimate) for estimate in mean_interval(first, n_resamples=500)]
    for module, name in ((_paired, "_MAX_SIGNS"), (_bootstrap, "_MAX_DRAWN"), (_bootstrap, "_MAX_MEANS")):
        monkeypatch.setattr(module, name, 70)
    assert compare_paired(first, second, **options) == comparisons
    np.testing.assert_allclose(
        [np.asarray(e) for e in mean_interval(first, n_resamples=500)], intervals, rtol=1e-12
    )
    monkeypatch.setattr(_paired, "_MAX_SIGNS", 7 * len(first))  # the last of 43 blocks has 6 draws
    assert compare_paired(first, second, **options) == comparisons
    monkeypatch.setattr(_paired, "_MAX_SIGNS", 1)
    monkeypatch.setattr(_bootstrap, "_MAX_MEANS", 1)
    assert compare_paired(first, second, **options) == comparisons
    for comparison in comparisons:
        assert comparison.p_value * 301 == pytest.approx(round(comparison.p_value * 301))


def test_paired_columns_hold_all_draws_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compare_paired(TABLE[:, 0], TABLE[:, 1], n_resamples=500)
    monkeypatch.setattr(_bootstrap, "_MAX_COUNTS", 10)
    monkeypatch.setattr(_bootstrap, "_MANY_TEXTS", 5)
    assert compare_paired(TABLE[:, 0], TABLE[:, 1], n_resamples=500) == expected


def test_as_many_draws_as_there_are_resamples_are_all_of_them() -> None:
    """Two texts have three resamples."""
    all_resamples = mean_interval([0.0, 1.0], confidence=0.5)
    assert [float(end) for end in mean_interval([0.0, 1.0], confidence=0.5, n_resamples=3)] == [
        float(end) for end in all_resamples
    ]
    assert resamples(2, 3, 0).probabilities is not None
    assert resamples(2, 2, 0).probabilities is None


def test_an_end_may_have_exactly_the_probability_of_its_tail() -> None:
    """Resamples of two texts have probabilities 1/4, 1/2 and 1/4; half of all leaves out 1/4 on each side."""
    _, low, high = mean_interval([0.0, 1.0], confidence=0.5)
    assert (float(low), float(high)) == (0, 1)
    _, low, high = mean_interval([0.0, 1.0], confidence=0.49)
    assert (float(low), float(high)) == (0.5, 0.5)
