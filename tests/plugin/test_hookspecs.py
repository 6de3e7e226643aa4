"""Published signatures: a hook may gain arguments, but never loses one."""

from __future__ import annotations

import inspect

from phaselens.plugin import hookspecs

# Arguments as of 0.1.0. Append to a list when a hook gains an argument; remove nothing.
PUBLISHED: dict[str, list[str]] = {
    "phaselens_metrics": [],
    "phaselens_models": [],
    "phaselens_texts": [],
    "phaselens_commands": ["cli"],
    "phaselens_run_finished": ["run"],
}


def specs() -> dict[str, list[str]]:
    """Return each hook's arguments, in their order."""
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in functions
        if hasattr(function, "phaselens_spec")
    }


def test_no_hook_lost_an_argument() -> None:
    assert specs() == PUBLISHED


def test_every_hook_has_a_sentence_and_types() -> None:
    for name in PUBLISHED:
        function = getattr(hookspecs, name)
        assert inspect.getdoc(function).endswith("."), name
        annotations = inspect.get_annotations(function)
        assert set(annotations) == {*PUBLISHED[name], "return"}
