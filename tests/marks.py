"""Marks that assign cases of a parametrised test to the quick tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def mark_later_slow(cases: Sequence[Any], n: int = 1) -> list[Any]:
    """Mark all cases after the first `n` as slow."""
    slow_cases = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases[n:]
    ]
    return [*cases[:n], *slow_cases]
