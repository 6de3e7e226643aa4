"""The documentation site has every page, and builds without a warning where mkdocs is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
#: Pages that the build takes from the top of the repository.
FROM_TOP = {"index.md", "contributing.md", "changelog.md"}


def pages(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(config["nav"])) == sorted(written | FROM_TOP)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_network_address(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "make demo" in start
    loaded = [
        part.split('"')[0] for part in start.split('src="')[1:] + start.split('rel="stylesheet" href="')[1:]
    ]
    assert [address for address in loaded if address.startswith(("http", "//"))] == []
