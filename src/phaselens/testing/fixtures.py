"""Fixtures that pytest finds if PhaseLens is installed. Heavy imports happen when a fixture is used.

def test_my_metric(phaselens_check):
    phaselens_check(MyMetric)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer
    from phaselens.testing import Planted

Created = TypeVar("Created")


@pytest.fixture(scope="session")
def phaselens_lens() -> Callable[..., HookedTransformer]:
    """`phaselens_lens("llama")`: a lens around a tiny random model of that family, created once per session."""
    from phaselens.testing import tiny_lens

    return _cached(tiny_lens)


@pytest.fixture(scope="session")
def phaselens_planted() -> Callable[..., Planted]:
    """`phaselens_planted("pure sink")`: a model with a known truth, created once per session."""
    from phaselens.testing import plant

    return _cached(plant)


@pytest.fixture(scope="session")
def phaselens_check() -> Callable[..., None]:
    """`phaselens_check(MyMetric)`: `check_metric`, which fails unless the metric keeps the contract."""
    from phaselens.testing import check_metric

    return check_metric


def _cached(create: Callable[..., Created]) -> Callable[..., Created]:
    """Return `create` with a cache of its results, by arguments."""
    results: dict[tuple[object, ...], Created] = {}

    def get(name: str, **options: Any) -> Created:
        key = (name, *sorted(options.items()))
        if key not in results:
            results[key] = create(name, **options)
        return results[key]

    return get
