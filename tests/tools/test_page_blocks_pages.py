"""The blocks of pages with output run, and print what the pages show."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.page_blocks import ROOT, run_page, same_output, trimmed

from phaselens.plugin import plugins

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "<!-- output -->" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_page_runs_and_shows_what_it_prints(path: Path, tmp_path: Path) -> None:
    outputs = list(run_page(path.read_text(encoding="utf-8"), tmp_path))
    plugins.cache_clear()
    assert outputs
    different = [
        (output.shown.code, trimmed(output.text))
        for output in outputs
        if not same_output(output.shown.code, trimmed(output.text))
    ]
    assert different == [], f"run: python -m tools.page_blocks {path.relative_to(ROOT)}"
