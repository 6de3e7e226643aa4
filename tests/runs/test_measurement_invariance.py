"""Results do not depend on batches, padding or the order of texts."""

import math
from typing import Any

import pytest

import phaselens
from phaselens.data import Text
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (3, 17, 1, 8, 8, 30, 5, 12)]
MOST = 1e-6


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2-drope-nope"])
def lens(request: pytest.FixtureRequest) -> Any:
    return toy_lens(request.param)


@pytest.fixture(scope="module")
def separate(lens: Any) -> Any:
    """A run with one text per batch, so without padding."""
    return phaselens.run(lens, metrics="sinks", texts=TEXTS, batch_tokens=1)


def difference(run_a: Any, run_b: Any) -> float:
    """The largest difference between the tables of two runs; infinite where other values than numbers differ."""
    largest = 0.0
    for name in ("texts", "heads", "layers", "summary", "positions", "strongest"):
        left, right = run_a.rows("sinks", name), run_b.rows("sinks", name)
        assert left.spec == right.spec
        assert len(left.rows) == len(right.rows) > 0
        for row, twin in zip(left.rows, right.rows, strict=True):
            for cell, same in zip(row, twin, strict=True):
                if isinstance(cell, float) and isinstance(same, float):
                    largest = max(largest, abs(cell - same))
                elif cell != same:
                    return math.inf
    return largest


@pytest.mark.parametrize("batch_tokens", mark_later_slow([40, 13, 100, 10_000]))
def test_batches_and_padding_change_no_number(lens: Any, separate: Any, batch_tokens: int) -> None:
    combined = phaselens.run(lens, metrics="sinks", texts=TEXTS, batch_tokens=batch_tokens)
    assert difference(separate, combined) <= MOST


def test_the_order_of_texts_changes_no_number(lens: Any, separate: Any) -> None:
    numbered = [Text(str(index), text) for index, text in enumerate(TEXTS)]
    turned = phaselens.run(lens, metrics="sinks", texts=numbered[::-1], batch_tokens=60)
    for name in ("texts", "strongest"):
        result = turned.rows("sinks", name).rows
        result.sort(key=lambda row: int(str(row[1])))  # stable: layers and heads stay in order
    assert difference(separate, turned) <= MOST


def test_the_same_run_twice_is_the_same_to_the_last_bit(lens: Any) -> None:
    runs = [phaselens.run(lens, metrics="sinks", texts=TEXTS, seed=3).to_dict() for _ in range(2)]
    assert runs[0] == runs[1]
