"""The reference of the plugin API equals the code and covers it."""

from __future__ import annotations

import re

from tools.plugin_reference import PAGE, page

import phaselens.plugin
from phaselens.plugin import hookspecs


def test_the_reference_matches_the_code() -> None:
    assert PAGE.read_text() == page(), "run python -m tools.plugin_reference"


def test_every_hook_and_every_public_name_is_in_the_reference() -> None:
    text = PAGE.read_text()
    hooks = [name for name in vars(hookspecs) if name.startswith("phaselens_")]
    assert len(hooks) == 5
    for name in (*hooks, *phaselens.plugin.__all__):
        assert re.search(rf"^### `{name}\b", text, re.MULTILINE), name
