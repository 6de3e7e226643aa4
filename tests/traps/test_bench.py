"""Every trap on the bundled RoPE model: ours is the dense float64 number, and the script's is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.traps.bench import Bench, Trap, TrapNumbers
from tools.traps.page import TRAPS

from tests.traps.benches import assert_told_apart

#: Traps that cost the bundled pair nothing; the tests of their modules have models that they do cost something.
HARMLESS = {
    "Key heads in the wrong order",
    "A layer that writes nothing",
    "Answers searched for words",
    "Norms in float16",
    "Weights of T tokens",
    "A float32 Gram matrix",
}
#: Traps that need interventions, decoding or prompts.
SLOW = {
    "A layer that writes nothing",
    "An edit that changes nothing",
    "Cells selected on the texts they are judged on",
    "Seeds as n",
    "Weights of T tokens",
    "A conversion without a causal mask",
    "Answers searched for words",
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    """The bundled RoPE model with the texts of the page."""
    return Bench.load("rope")


def case(trap: Trap) -> object:
    """Return the parameters of one trap, marked as slow if it needs more than a forward."""
    marks = [pytest.mark.slow] if trap.name in SLOW else []
    return pytest.param(trap, id=f"{trap.name}: {trap.quantity}", marks=marks)


@pytest.mark.parametrize("trap", [case(trap) for trap in TRAPS])
def test_ours_is_the_dense_number_and_the_scripts_is_not(bench: Bench, trap: Trap) -> None:
    numbers = trap.measure(bench)
    if trap.name in HARMLESS:
        assert trap.problems(numbers) == []
    else:
        assert_told_apart(trap, numbers)


def test_traps_without_an_error_to_find_are_the_harmless_ones() -> None:
    assert {trap.name for trap in TRAPS if not trap.least_error} <= HARMLESS
    assert {trap.name for trap in TRAPS} >= HARMLESS | SLOW


def test_a_number_that_is_off_or_missing_is_a_problem() -> None:
    trap = Trap("a", "b", 0.1, lambda bench: TrapNumbers(None, None, None))
    assert trap.problems(TrapNumbers(1.0, 1.000009, 1.2)) == []
    assert trap.problems(TrapNumbers(None, None, 0.0)) == []
    for numbers in (
        TrapNumbers(1.0, 1.0001, 1.2), TrapNumbers(1.0, 1.0, 1.05), TrapNumbers(None, 0.0, None),
        TrapNumbers(1.0, None, None),
        TrapNumbers(1.0, float("nan"), 1.2),
    ):  # fmt: skip
        assert trap.problems(numbers) != []


def test_the_bench_reads_no_part_of_phaselens_for_its_reference() -> None:
    source = (Path(__file__).parents[2] / "tools" / "traps" / "dense.py").read_text(encoding="utf-8")
    assert "import phaselens" not in source
    assert "from phaselens" not in source
