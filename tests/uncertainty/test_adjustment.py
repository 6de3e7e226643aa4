"""Adjusted p-values against their definitions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from phaselens.errors import InputError
from phaselens.plugin import ADJUSTED_P, with_adjusted_p
from phaselens.uncertainty import ADJUSTMENTS, adjust_p_values

P_VALUES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


def holm_rejections(p_values: list[float], level: float) -> list[bool]:
    """The step-down procedure itself: reject the smallest p while it is at most level over the tests that are left."""
    rejected = [False] * len(p_values)
    n_left = len(p_values)
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        if p_values[index] * n_left > level:
            break
        rejected[index] = True
        n_left -= 1
    return rejected


@given(P_VALUES, st.floats(0.01, 0.99))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float], level: float) -> None:
    adjusted = adjust_p_values(p_values)
    assert [value is not None and value <= level for value in adjusted] == holm_rejections(p_values, level)


@given(P_VALUES)
def test_the_order_missing_values_and_one_test_change_nothing(p_values: list[float]) -> None:
    for method in ("holm", "benjamini-hochberg"):
        adjusted = adjust_p_values(p_values, method=method)
        assert adjust_p_values(p_values[::-1], method=method) == adjusted[::-1]
        assert adjust_p_values([None, *p_values, float("nan")], method=method) == [None, *adjusted, None]
        assert adjust_p_values(p_values[:1], method=method) == p_values[:1]
    assert adjust_p_values(p_values, method="benjamini-hochberg") == pytest.approx(
        false_discovery_control(p_values)
    )
    assert all(a >= b for a, b in zip(adjust_p_values(p_values), adjusted, strict=True))


def test_arrays_are_accepted_and_other_values_refused() -> None:
    assert adjust_p_values(np.array([0.01, np.nan])) == [0.01, None]
    for wrong in (1.5, -0.25):
        with pytest.raises(InputError, match=rf"p_values from 0 to 1, received {wrong}$"):
            adjust_p_values([0.0, 1.0, wrong, 7.0])
    with pytest.raises(InputError, match="method is 'bonferroni'; "):
        adjust_p_values([0.5], method="bonferroni")
    with pytest.raises(InputError, match="each of p_values as a number or None, received '1'"):
        adjust_p_values(["1"])  # type: ignore[list-item]


def test_rows_get_the_two_columns() -> None:
    rows = with_adjusted_p([("a", 0.02), ("b", None), ("c", 0.03)], 1)
    assert rows == [("a", 0.02, 0.04, 0.03), ("b", None, None, None), ("c", 0.03, 0.04, 0.03)]
    assert [column.name for column in ADJUSTED_P] == ["p_holm", "p_bh"]


@pytest.mark.parametrize("method", ADJUSTMENTS)
def test_no_value_is_adjusted_to_none(method: str) -> None:
    assert adjust_p_values([], method=method) == []
    assert adjust_p_values([None, float("nan")], method=method) == [None, None]


@pytest.mark.parametrize("method", ADJUSTMENTS)
def test_whole_numbers_are_adjusted_to_floats(method: str) -> None:
    adjusted = adjust_p_values([0, 1, 1], method=method)
    assert adjusted == [0.0, 1.0, 1.0]
    assert {type(value) for value in adjusted} == {float}
