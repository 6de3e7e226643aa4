"""Which cases of a parametrised test belong to the quick tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def first_quick(cases: Sequence[Any], n: int = 1) -> list[Any]:
    """The same cases; those after the first `n` are left to the whole suite."""
    later = [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.slow)
        for each in cases[n:]
    ]
    return [*cases[:n], *later]
