"""p-values adjusted for their number: Holm's step-down method, and Benjamini and Hochberg's step-up method."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from phaselens.errors import FloatArray, InputError, close_matches, is_list_like, is_number, short_form

#: Methods of `adjust_p_values`, the default first.
ADJUSTMENTS = ("holm", "benjamini-hochberg")


def adjust_p_values(p_values: Iterable[float | None], *, method: str = "holm") -> list[float | None]:
    """Return the p-values of one family of tests, adjusted for their number; None and NaN stay None and do not count.

    Args:
        p_values: p of each test of the family, 0 to 1, in any order.
        method: `holm` bounds the probability of any false positive among all tests, whatever their dependence (Holm
            1979); `benjamini-hochberg` bounds the expected share of false positives among the positives, for tests
            that are independent or depend positively (Benjamini and Hochberg 1995), by
            `scipy.stats.false_discovery_control`.

    Raises:
        InputError: for another method, or values that are no probabilities.

    >>> adjust_p_values([0.01, 0.04, 0.03, None])
    [0.03, 0.06, 0.06, None]
    >>> adjust_p_values([0.01, 0.04, 0.03], method="benjamini-hochberg")
    [0.03, 0.04, 0.04]
    """
    if method not in ADJUSTMENTS:
        raise InputError(f"method is {short_form(method)}; {close_matches(str(method), ADJUSTMENTS)}")
    if not is_list_like(p_values):
        raise InputError(f"expected p_values as a list of numbers, received {short_form(p_values)}")
    values = list(p_values)
    present = [index for index, value in enumerate(values) if value is not None and not _is_nan(value)]
    p = np.array([values[index] for index in present], dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        wrong = p[~((p >= 0) & (p <= 1))][0]
        raise InputError(f"expected p_values from 0 to 1, received {wrong:g}")
    adjusted: list[float | None] = [None] * len(values)
    for index, value in zip(present, _ADJUST[method](p).tolist(), strict=True):
        adjusted[index] = value
    return adjusted


def _is_nan(value: object) -> bool:
    if not is_number(value):
        raise InputError(f"expected each of p_values as a number or None, received {short_form(value)}")
    return bool(value != value)


def _holm(p: FloatArray) -> FloatArray:
    """Return the running maximum of p times the number of tests that are not smaller, at most 1."""
    order = np.argsort(p)
    steps = np.arange(len(p), 0, -1) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _benjamini_hochberg(p: FloatArray) -> FloatArray:
    from scipy.stats import false_discovery_control

    adjusted: FloatArray = np.asarray(false_discovery_control(p, method="bh"), dtype=np.float64)
    return adjusted


_ADJUST = {"holm": _holm, "benjamini-hochberg": _benjamini_hochberg}
