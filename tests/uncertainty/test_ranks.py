"""Rank correlations against scipy's, and their p against a count of all orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from phaselens.uncertainty import rank_correlation, spearman


def test_correlations_with_ties_are_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, (40, 25)).astype(float), rng.normal(size=25).round(1)
    expected = [stats.spearmanr(row, second).statistic for row in first]
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12)


def test_p_is_the_share_of_orders_that_are_as_extreme() -> None:
    first, second = np.arange(6.0), np.array([1.0, 0.0, 2.0, 5.0, 3.0, 4.0])
    result = rank_correlation(first, second)
    assert result.value is not None
    orders = [abs(spearman(first, np.array(order))) for order in permutations(second)]
    exact = np.mean(np.array(orders) >= abs(result.value) - 1e-12)
    assert result.p_value == pytest.approx(exact, abs=0.01)
    assert rank_correlation(first, second) == result


def test_what_has_no_order_is_missing_with_the_reason() -> None:
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]).reason == "2 items; a rank correlation needs at least 3"
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).reason == "all items of one side are equal"
    with pytest.raises(ValueError, match="NaN or infinite"):
        rank_correlation([1.0, 2.0, float("nan")], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="of one length"):
        spearman([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("correlate", [spearman, rank_correlation])
def test_items_of_different_numbers_are_refused_with_both(correlate: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"of one length, received \(3,\) and \(2,\)"):
        correlate([1.0, 2.0, 3.0], [1.0, 2.0])


def test_two_items_agree_or_disagree() -> None:
    assert spearman([1.0, 2.0], [[3.0, 5.0], [5.0, 3.0], [4.0, 4.0]]).tolist()[:2] == [1.0, -1.0]
    assert np.isnan(spearman([1.0, 2.0], [4.0, 4.0]))
    assert np.isnan(spearman([], []))


def test_the_smallest_p_is_that_of_one_order_among_all_drawn() -> None:
    """No random order of 30 items is the observed one."""
    items = np.arange(30.0)
    assert rank_correlation(items, items).p_value == 1 / 10_000
    assert rank_correlation(items, -items, n_permutations=99).p_value == 1 / 100
    assert rank_correlation(items, items % 7) == rank_correlation(items, items % 7, seed=0)
    assert rank_correlation(items, items % 7, seed=1) != rank_correlation(items, items % 7, seed=2)


def test_a_missing_correlation_has_the_number_of_items() -> None:
    assert rank_correlation([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]).n == 4
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]).n == 2
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]).value == pytest.approx(0.5)
