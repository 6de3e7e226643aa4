"""Benches of tiny models, and the numbers that every trap must pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tools.traps.bench import Bench, Trap, TrapNumbers
from tools.traps.dense import DenseModel

from phaselens.testing import tiny_model
from tests.toys import letters, toy_lens

TEXTS = [letters(9), letters(20, 3), letters(14, 5)]


def tiny_bench(family: str = "llama", texts: list[str] = TEXTS, **overrides: Any) -> Bench:
    """Return the bench of a tiny random model."""
    lens = toy_lens(family, **overrides)
    lens.tokenizer = lens.text_tokenizer
    return Bench(family, lens, DenseModel(tiny_model(family, **overrides)), texts)


def assert_told_apart(trap: Trap, numbers: TrapNumbers, least_error: float | None = None) -> None:
    """Assert that ours equals the reference and the script does not, and that the script in our place would fail."""
    assert trap.problems(numbers, least_error) == []
    swapped = replace(numbers, measured=numbers.script, script=numbers.measured)
    assert trap.problems(swapped, least_error) != []
