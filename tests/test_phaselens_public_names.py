"""Public names of the packages whose modules are private."""

from __future__ import annotations

import importlib

import pytest


def sort_key(name: str) -> tuple[bool, bool, str]:
    """Constants come first, then classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


@pytest.mark.parametrize("package", ["attention", "spectrum", "uncertainty"])
def test_all_lists_every_public_name(package: str) -> None:
    module = importlib.import_module(f"phaselens.{package}")
    assert sorted(module.__all__, key=sort_key) == module.__all__
    public = {name for name in vars(module) if name.isidentifier() and not name.startswith("_")}
    assert public == set(module.__all__)
