"""The published signatures: a hook may gain arguments, and never loses one."""

from __future__ import annotations

import inspect

from phaselens.plugin import hookspecs

# Arguments as of 0.1.0. Append to a list when a hook gains an argument; take nothing away.
PUBLISHED: dict[str, list[str]] = {
    "phaselens_metrics": [],
    "phaselens_models": [],
    "phaselens_texts": [],
    "phaselens_commands": ["cli"],
    "phaselens_run_finished": ["run"],
}


def specs() -> dict[str, list[str]]:
    """Each hook's arguments, in their order."""
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {
        name: list(inspect.signature(each).parameters)
        for name, each in functions
        if hasattr(each, "phaselens_spec")
    }


def test_no_hook_lost_an_argument() -> None:
    assert specs() == PUBLISHED


def test_every_hook_has_a_sentence_and_types() -> None:
    for name in PUBLISHED:
        function = getattr(hookspecs, name)
        assert inspect.getdoc(function).endswith("."), name
        annotations = inspect.get_annotations(function)
        assert set(annotations) == {*PUBLISHED[name], "return"}
