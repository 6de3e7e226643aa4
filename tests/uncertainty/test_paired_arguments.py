"""Arguments of paired comparisons: errors name them, defaults agree, and options reach the intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from phaselens.uncertainty import (
    adjust_p_values,
    compare_arms,
    compare_conditions,
    compare_paired,
    mean_interval,
    paired_interval,
    rank_correlation,
    spearman,
    wilson_interval,
)

RNG = np.random.default_rng(11)
FIRST, SECOND = RNG.normal(size=16), RNG.normal(size=16)
V, T = [1.0, 2.0], [[1.0], [2.0]]
NUMBERS = "as an array of numbers"
SAME = "expected the same texts in all, received"
MASK = "expected present as an array of True"
PRESENT = "expected present of the values' shape"
COUNTS = "expected n_predicted of at least 0, received"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_arms(T, T), r"expected treated \[text\], received shape \(2, 1\)"),
        (lambda: compare_arms(V, V), r"expected control \[text, seed\], received shape \(2,\)"),
        (lambda: compare_arms(V, [["a"], ["b"]]), f"expected control {NUMBERS}"),
        (lambda: compare_arms(V, T, n_predicted=T), r"expected n_predicted \[text\], received shape \(2, 1\)"),
        (lambda: compare_arms(V, T, n_predicted=[1, -1]), f"{COUNTS} -1.0 for text 1"),
        (lambda: compare_arms(V, T, n_predicted=[1.5, 1]), "expected whole numbers for n_predicted, received 1.5 "),
        (lambda: compare_arms(V, T, n_predicted=[1]), f"{SAME} treated of 2, control of 2, n_predicted of 1"),
        (lambda: compare_conditions(T, T, V), r"expected baseline \[text\], received shape \(2, 1\)"),
        (lambda: compare_conditions(V, V, V), r"expected conditions \[text, condition\], received shape \(2,\)"),
        (lambda: compare_conditions(V, T, T), r"expected n_predicted \[text\], received shape \(2, 1\)"),
        (lambda: compare_conditions(V, T, V, lengths=T), r"expected lengths \[text\], received shape \(2, 1\)"),
        (lambda: compare_conditions(V, T, [1]), f"{SAME} baseline of 2, conditions of 2, n_predicted of 1"),
        (lambda: compare_conditions(V, T, V, lengths=[9]), f"{SAME} .* n_predicted of 2, lengths of 1"),
        (lambda: compare_conditions(V, T, V, lengths=[1, 1]), "expected lengths of at least n_predicted"),
        (lambda: compare_conditions(V, T, [-1, 1]), f"{COUNTS} -1.0 for text 0"),
        (lambda: compare_conditions(V, T, [np.inf, 1]), f"{COUNTS} inf for text 0"),
        (lambda: compare_conditions(V, T, V, n_permutations=0), "expected n_permutations as a whole number of at"),
        (lambda: compare_conditions(V, T, V, n_permutations=1.5), "expected n_permutations as a whole number"),
        (lambda: compare_conditions(V, T, V, n_resamples=0), "expected n_resamples as a whole number of at"),
        (lambda: compare_conditions(V, T, V, seed=-1), "expected seed as a whole number of at least 0, received -1"),
        (lambda: compare_conditions(V, T, V, confidence=0), "expected a confidence between 0 and 1, received 0"),
        (lambda: compare_conditions(V, T, V, confidence=1), "expected a confidence between 0 and 1, received 1"),
        (lambda: compare_conditions(V, T, V, confidence="a"), "expected confidence as a number, received 'a'"),
        (lambda: compare_paired(V, T), r"expected first \[text, quantity\], received shape \(2,\)"),
        (lambda: compare_paired(T, V), r"expected second \[text, quantity\], received shape \(2,\)"),
        (lambda: compare_paired(T, [[1.0]]), f"{SAME} first of 2, second of 1"),
        (lambda: compare_paired(T, [[1.0, 2.0]] * 2), "first has 1 quantities, second 2"),
        (lambda: paired_interval(["a"], V), f"expected first {NUMBERS}"),
        (lambda: paired_interval(V, ["a"]), f"expected second {NUMBERS}"),
        (lambda: paired_interval(V, [1.0]), r"expected two arrays of one shape \[text, \*cells\], received \(2,\)"),
        (lambda: paired_interval(V, V, present=[True]), rf"{PRESENT} \(2,\), received \(1,\)"),
        (lambda: mean_interval(["a"]), f"expected values {NUMBERS}"),
        (lambda: mean_interval(1.0), r"expected values \[text, \*cells\], received a single number"),
        (lambda: mean_interval(V, present=[[True]] * 2), rf"{PRESENT} \(2,\), received \(2, 1\)"),
        (lambda: mean_interval(V, transform=3), "expected transform as a function"),
        (lambda: mean_interval(T, present=[[True], ["x"]]), rf"{MASK} and False, received \[\[True\], \['x'\]\]$"),
        (lambda: mean_interval([V, V], present=[[1, 1], [1, 0]], transform=np.mean), "1 of 2 texts have some values"),
        (lambda: spearman(["a"], V), f"expected first {NUMBERS}"),
        (lambda: spearman(V, ["a"]), f"expected second {NUMBERS}"),
        (lambda: spearman(1.0, 2.0), r"expected first and second \[..., item\] of one length, received \(\) and \(\)"),
        (lambda: rank_correlation(["a"], V), f"expected first {NUMBERS}"),
        (lambda: rank_correlation(V, ["a"]), f"expected second {NUMBERS}"),
        (lambda: rank_correlation(T, T), r"expected first and second \[item\] of one length, received \(2, 1\)"),
        (lambda: rank_correlation([1, 2, np.inf], [1, 2, 3]), "first or second has values that are NaN or infinite"),
        (lambda: rank_correlation(V, V, n_permutations=0), "expected n_permutations as a whole number of at least"),
        (lambda: rank_correlation(V, V, seed=-1), "expected seed as a whole number of at least 0"),
        (lambda: wilson_interval(1.5, 2), "expected successes as a whole number, received 1.5"),
        (lambda: wilson_interval(1, 2.5), "expected n as a whole number, received 2.5"),
        (lambda: wilson_interval(3, 2), "expected 0 to n = 2 successes, received 3"),
        (lambda: adjust_p_values(0.5), "expected p_values as a list of numbers, received 0.5"),
        (lambda: adjust_p_values([0.5, 1.5]), "expected p_values from 0 to 1, received 1.5"),
        (lambda: adjust_p_values([0.5, -0.5]), "expected p_values from 0 to 1, received -0.5"),
        (lambda: adjust_p_values(["a"]), "expected each of p_values as a number or None, received 'a'"),
        (lambda: adjust_p_values([0.5], method="holmes"), "method is 'holmes'; did you mean holm"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def ends(comparison: Any) -> tuple[float, float]:
    return comparison.ci_low, comparison.ci_high


def nats(**options: Any) -> Any:
    return compare_conditions(np.zeros(16), (SECOND - FIRST)[:, None], np.ones(16), **options)[0]


def test_all_comparisons_of_the_same_texts_draw_the_same() -> None:
    """16 texts have too many resamples and signs to try all, so that the defaults for draws matter."""
    for options in ({}, {"seed": 3}, {"n_resamples": 77}, {"confidence": 0.5}, {"n_permutations": 99}):
        arms = compare_arms(SECOND, FIRST[:, None], **options)
        (many,) = compare_paired(FIRST[:, None], SECOND[:, None], **options)
        losses = nats(**options)
        assert ends(arms) == pytest.approx(ends(many), rel=1e-12)
        assert ends(arms) == pytest.approx((losses.delta_low, losses.delta_high), rel=1e-12)
        assert arms.p_value == many.p_value == losses.p_value
        if "n_permutations" not in options:
            _, low, high = paired_interval(SECOND, FIRST, **options)
            assert ends(arms) == pytest.approx((float(low), float(high)), rel=1e-12)
            expected = mean_interval(SECOND - FIRST, **options)
            assert paired_interval(SECOND, FIRST, **options) == expected


def test_each_option_changes_the_draws() -> None:
    default = nats()
    assert not default.p_exact
    assert ends(nats(seed=3)) != ends(default) != ends(nats(n_resamples=77))
    assert nats(seed=3).p_value != default.p_value
    assert nats(confidence=0.5).ci_high < default.ci_high
    assert (nats(n_permutations=99).p_value * 100) == pytest.approx(
        round(nats(n_permutations=99).p_value * 100)
    )
    assert nats(n_permutations=2**16).p_exact, "all of 2^16 signs"
    assert not nats(n_permutations=2**16 - 1).p_exact


def test_the_smallest_options_are_accepted() -> None:
    comparison = nats(n_resamples=1, n_permutations=1, seed=0, confidence=1e-9)
    assert comparison.delta_low == comparison.delta_high
    assert comparison.p_value in (0.5, 1.0)
    assert rank_correlation(FIRST, SECOND, n_permutations=1, seed=0).p_value in (0.5, 1.0)
