"""Fixtures that pytest finds by itself where PhaseLens is installed. Heavy imports wait until one is used.

def test_my_metric(phaselens_check):
    phaselens_check(MyMetric)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def phaselens_lens() -> Callable[..., Any]:
    """`phaselens_lens("llama")`: a lens around a tiny random model of that family, made once a session."""
    from phaselens.testing import tiny_lens

    return _once(tiny_lens)


@pytest.fixture(scope="session")
def phaselens_planted() -> Callable[..., Any]:
    """`phaselens_planted("pure sink")`: a model in which the truth is known, made once a session."""
    from phaselens.testing import plant

    return _once(plant)


@pytest.fixture(scope="session")
def phaselens_check() -> Callable[..., None]:
    """`phaselens_check(MyMetric)`: fails unless the metric keeps the contract."""
    from phaselens.testing import check_metric

    return check_metric


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def find(name: str, **options: Any) -> Any:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make(name, **options)
        return made[key]

    return find
