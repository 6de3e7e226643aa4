"""Batches, padding and the order of texts change no number."""

import math
from typing import Any

import pytest

import phaselens
from phaselens.data import Text
from tests.marks import first_quick
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (3, 17, 1, 8, 8, 30, 5, 12)]
MOST = 1e-6


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2-drope-nope"])
def lens(request: pytest.FixtureRequest) -> Any:
    return toy_lens(request.param)


@pytest.fixture(scope="module")
def alone(lens: Any) -> Any:
    """Every text by itself: nothing is padded."""
    return phaselens.run(lens, metrics="sinks", texts=TEXTS, batch_tokens=1)


def difference(one: Any, other: Any) -> float:
    """The largest difference of two runs' tables; infinite where anything but a number differs."""
    largest = 0.0
    for name in ("texts", "heads", "layers", "summary", "positions", "strongest"):
        left, right = one.rows("sinks", name), other.rows("sinks", name)
        assert left.spec == right.spec
        assert len(left.rows) == len(right.rows) > 0
        for row, twin in zip(left.rows, right.rows, strict=True):
            for cell, same in zip(row, twin, strict=True):
                if isinstance(cell, float) and isinstance(same, float):
                    largest = max(largest, abs(cell - same))
                elif cell != same:
                    return math.inf
    return largest


@pytest.mark.parametrize("batch_tokens", first_quick([40, 13, 100, 10_000]))
def test_batches_and_padding_change_no_number(lens: Any, alone: Any, batch_tokens: int) -> None:
    together = phaselens.run(lens, metrics="sinks", texts=TEXTS, batch_tokens=batch_tokens)
    assert difference(alone, together) <= MOST


def test_the_order_of_texts_changes_no_number(lens: Any, alone: Any) -> None:
    numbered = [Text(str(place), text) for place, text in enumerate(TEXTS)]
    turned = phaselens.run(lens, metrics="sinks", texts=numbered[::-1], batch_tokens=60)
    for name in ("texts", "strongest"):
        found = turned.rows("sinks", name).rows
        found.sort(key=lambda row: int(str(row[1])))  # stable: layers and heads stay in order
    assert difference(alone, turned) <= MOST


def test_the_same_run_twice_is_the_same_to_the_last_bit(lens: Any) -> None:
    runs = [phaselens.run(lens, metrics="sinks", texts=TEXTS, seed=3).to_dict() for _ in range(2)]
    assert runs[0] == runs[1]
