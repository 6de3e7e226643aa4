"""Many paired comparisons at once: each is that of `compare_arms` on its own texts."""

from __future__ import annotations

import numpy as np
import pytest

from phaselens.uncertainty import compare_arms, compare_paired

RNG = np.random.default_rng(3)
FIRST = RNG.normal(size=(12, 5))
SECOND = FIRST + RNG.normal(0.4, 0.5, size=(12, 5))
FIELDS = ("difference", "ci_low", "ci_high", "p_value", "p_exact", "d_z", "rank_biserial")


def test_a_column_is_the_comparison_of_two_arms() -> None:
    for column, comparison in enumerate(compare_paired(FIRST, SECOND)):
        arms = compare_arms(SECOND[:, column], FIRST[:, [column]])
        assert comparison.n_texts == 12
        assert (comparison.first, comparison.second) == pytest.approx((arms.control, arms.treated), rel=1e-12)
        for field in FIELDS:
            assert getattr(comparison, field) == pytest.approx(getattr(arms, field), rel=1e-12), field


def test_missing_values_leave_out_texts_of_their_own_column_only() -> None:
    first, second = FIRST.copy(), SECOND.copy()
    first[2, 1] = np.nan
    second[7, 1] = np.inf
    second[:, 4] = np.nan
    comparisons = compare_paired(first, second)
    assert [comparison.n_texts for comparison in comparisons] == [12, 10, 12, 12, 0]
    keep = [text for text in range(12) if text not in (2, 7)]
    assert comparisons[1] == compare_paired(FIRST[keep][:, [1]], SECOND[keep][:, [1]])[0]
    assert comparisons[0] == compare_paired(FIRST, SECOND)[0]
    assert comparisons[4].difference is None
    assert comparisons[4].reasons["difference"] == "no text has both values"


def test_values_that_agree_differ_by_exactly_zero() -> None:
    (same,) = compare_paired(FIRST[:, [0]], FIRST[:, [0]])
    assert (same.difference, same.ci_low, same.ci_high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert same.d_z is None
    assert same.reasons["d_z"] == "all differences are 0"


def test_one_text_has_a_difference_without_spread() -> None:
    (single,) = compare_paired([[1.0]], [[3.0]])
    assert (single.first, single.second, single.difference) == (1.0, 3.0, 2.0)
    assert single.ci_low is None
    missing = {"ci_low", "ci_high", "p_value", "p_exact", "d_z", "rank_biserial"}
    assert single.reasons.keys() >= missing
    assert {single.reasons[name] for name in missing} == {"1 text; spread over texts needs at least 2"}
    assert all(getattr(single, name) is None for name in missing)


def test_differences_within_the_rounding_of_either_side_have_no_effect_size() -> None:
    large, small = np.full((4, 1), 1e16), np.array([[1.0], [3.0], [2.0], [1.0]])
    for first, second in ((large, small), (small, large)):
        (comparison,) = compare_paired(first, second)
        assert comparison.d_z is None
        assert "up to rounding" in comparison.reasons["d_z"]


def test_a_large_quantity_makes_no_other_one_look_like_rounding() -> None:
    large = np.full((12, 1), 1e18)
    for first, second in ((0, 1), (1, 0)):
        beside = [
            np.hstack([table, large * is_large]) for table, is_large in ((FIRST, first), (SECOND, second))
        ]
        assert compare_paired(*beside)[:5] == compare_paired(FIRST, SECOND)


def test_the_order_of_few_texts_does_not_matter() -> None:
    order = [3, 1, 0, 2]
    assert compare_paired(FIRST[:4][order], SECOND[:4][order])[0].ci_low == pytest.approx(
        compare_paired(FIRST[:4], SECOND[:4])[0].ci_low, rel=1e-12
    )


def test_arrays_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="first has 5 quantities, second 4"):
        compare_paired(FIRST, SECOND[:, :4])
    with pytest.raises(ValueError, match="same texts"):
        compare_paired(FIRST, SECOND[:3])
    with pytest.raises(ValueError, match=r"expected first \[text, quantity\]"):
        compare_paired(FIRST[0], SECOND)
