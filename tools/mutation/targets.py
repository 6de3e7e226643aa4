"""The parts of the package that are mutated, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MutationTarget:
    """Modules, as patterns of paths, and the tests of them. Of these tests, mutmut runs those that reach a mutant."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


#: Tests of every public function: their examples, and calls with wrong arguments.
_PUBLIC = (
    "tests/test_phaselens_examples.py",
    "tests/test_phaselens_wrong_calls.py",
    "tests/test_phaselens_arguments.py",
)

TARGETS = (
    MutationTarget("attention", ("src/phaselens/attention/*",), ("tests/attention", *_PUBLIC)),
    MutationTarget("spectrum", ("src/phaselens/spectrum/*",), ("tests/spectrum", *_PUBLIC)),
    MutationTarget("uncertainty", ("src/phaselens/uncertainty/*",), ("tests/uncertainty", *_PUBLIC)),
    MutationTarget(
        "interventions",
        tuple(
            f"src/phaselens/runs/{module}.py"
            for module in ("condition_editor", "condition_passes", "layer_pass")
        ),
        (
            "tests/runs/test_condition_editor.py",
            "tests/runs/test_condition_passes.py",
            "tests/runs/test_layer_pass_conditions.py",
            "tests/runs/test_layer_points.py",
            "tests/runs/test_shard_work.py",
            "tests/runs/test_engine.py",
        ),
    ),
)


def target_named(name: str) -> MutationTarget:
    """Return the target of this name; KeyError for another."""
    return {target.name: target for target in TARGETS}[name]
