"""Examples in the docstrings of PhaseLens and its plugins."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from phaselens import attention

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(source).with_suffix("").parts)
    for source, package in ((ROOT / "src", "phaselens"), (ROOT / "plugins", "phaselens_plugins"))
    for path in sorted((source / package).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    n_failed, n_examples = doctest.testmod(importlib.import_module(module))
    assert n_examples
    assert not n_failed


def test_every_public_function_of_attention_has_an_example() -> None:
    for name in attention.__all__:
        function = getattr(attention, name)
        if (
            callable(function)
            and not isinstance(function, type)
            and name not in ("explicit_scores", "explicit_pattern")
        ):
            assert ">>> " in function.__doc__, name
