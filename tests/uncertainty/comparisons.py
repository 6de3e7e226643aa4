"""Comparison of one condition with its baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from phaselens.uncertainty import LossComparison, compare_conditions


def compare_losses(
    baseline: ArrayLike, condition: ArrayLike, n_predicted: ArrayLike, **options: Any
) -> LossComparison:
    """`compare_conditions` for a single condition [text]."""
    return compare_conditions(baseline, np.asarray(condition)[:, None], n_predicted, **options)[0]
