"""The parts of the package that are mutated, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
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
    Target("attention", ("src/phaselens/attention/*",), ("tests/attention", *_PUBLIC)),
    Target("spectrum", ("src/phaselens/spectrum/*",), ("tests/spectrum", *_PUBLIC)),
    Target("uncertainty", ("src/phaselens/uncertainty/*",), ("tests/uncertainty", *_PUBLIC)),
    Target(
        "interventions",
        tuple(
            f"src/phaselens/runs/{module}.py"
            for module in ("condition_editor", "condition_passes", "layer_pass", "resume")
        ),
        (
            "tests/runs/test_condition_editor.py",
            "tests/runs/test_condition_editor_edits.py",
            "tests/runs/test_condition_passes.py",
            "tests/runs/test_condition_passes_outcomes.py",
            "tests/runs/test_layer_pass.py",
            "tests/runs/test_layer_pass_conditions.py",
            "tests/runs/test_layer_points.py",
            "tests/runs/test_resume.py",
            "tests/runs/test_shard_work.py",
            "tests/runs/test_engine.py",
            "tests/lens/test_key_edits.py",
            "tests/plugins/test_causal.py",
        ),
    ),
)


def target_named(name: str) -> Target:
    """Return the target of this name; KeyError for another."""
    return {target.name: target for target in TARGETS}[name]
