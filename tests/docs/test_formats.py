"""docs/formats.md names every extra that a format needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from phaselens.lens import gguf_files, quantised

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def test_every_extra_exists() -> None:
    named = set(re.findall(r"phaselens\[([\w-]+)\]", PAGE))
    assert named == EXTRAS.keys() - {"dev", "docs", "mutation", "ray", "report", "smollm2"}
    assert set(re.findall(r"phaselens\[([\w-]+)\]", gguf_files.INSTALL)) <= named


def test_the_extra_of_a_method_installs_the_packages_that_read_it() -> None:
    for method, packages in quantised._PACKAGES.items():
        assert sorted(re.split(r"[>=]", requirement)[0] for requirement in EXTRAS[method]) == sorted(packages)
