"""The parts of the package that are mutated, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


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


def _examples(package: str) -> tuple[str, ...]:
    """Return the tests of a package's examples: those of the others run models, and take longer than all else."""
    modules = [path for path in sorted((SOURCE / package).glob("*.py")) if ">>> " in path.read_text()]
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in modules]
    return tuple(f"tests/test_phaselens_examples.py::test_examples_run[{name}]" for name in names)


TARGETS = (
    MutationTarget(
        "attention",
        ("src/phaselens/attention/*",),
        ("tests/attention", *_examples("phaselens/attention"), *_PUBLIC[1:]),
    ),
    MutationTarget("spectrum", ("src/phaselens/spectrum/*",), ("tests/spectrum", *_PUBLIC)),
    MutationTarget("uncertainty", ("src/phaselens/uncertainty/*",), ("tests/uncertainty", *_PUBLIC)),
    MutationTarget(
        "interventions",
        tuple(
            f"src/phaselens/runs/{module}.py"
            for module in ("condition_editor", "condition_passes", "layer_pass", "resume")
        ),
        # Without test_condition_passes.py and others that run whole metrics and take longer than all of these.
        (
            "tests/runs/test_condition_editor.py",
            "tests/runs/test_condition_editor_edits.py",
            "tests/runs/test_condition_passes_outcomes.py",
            "tests/runs/test_layer_pass.py",
            "tests/runs/test_layer_pass_conditions.py",
            "tests/runs/test_resume.py",
            "tests/lens/test_key_edits.py",
        ),
    ),
)


def target_named(name: str) -> MutationTarget:
    """Return the target of this name; KeyError for another."""
    return {target.name: target for target in TARGETS}[name]
