"""The page about testing a plugin explains every check, planted truth and fixture."""

from __future__ import annotations

import re

from tools.plugin_reference import PAGE

from phaselens import testing
from phaselens.testing import fixtures

FOLDER = PAGE.parent


def test_every_check_every_truth_and_every_fixture_is_explained() -> None:
    from phaselens.testing._checks import CHECKS

    text = (FOLDER / "testing.md").read_text()
    assert re.findall(r"^\| ([a-z].*?|strict JSON) \| ", text, re.MULTILINE)[1:] == [
        "a usable class",
        *CHECKS,
    ]
    assert all(f'`"{kind}"`' in text for kind in testing.PLANTED)
    assert all(f"`{name}(" in text for name in vars(fixtures) if name.startswith("phaselens_"))
