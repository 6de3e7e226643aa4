"""Every block of code in README.md and docs/ runs, prints what its page shows, or is marked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tools.page_blocks import NOT_RUN, ROOT, Block, blocks, run_page, same_output, trimmed

from phaselens.plugin import plugins

DOCS = ROOT / "docs"
TESTS = ROOT / "tests"
#: Pages whose blocks another test runs or compares with stored results.
RUN_ELSEWHERE = {
    "README.md": "docs/test_readme.py",
    "docs/architecture.md": "docs/test_architecture.py",
    "docs/causality.md": "docs/test_causality.py",
    "docs/cli.md": "docs/test_cli.py",
    "docs/patching.md": "docs/test_patching.py",
    "docs/plugins/reference.md": "docs/test_reference.py",
    "docs/plugins/tutorial.md": "docs/test_tutorial.py",
    "docs/real-model.md": "docs/test_pair_real_model.py",
    "docs/repl.md": "docs/test_repl.py",
    "docs/tasks.md": "docs/test_tasks.py",
    "docs/tour.md": "docs/test_tour.py",
    "docs/traps.md": "docs/test_traps.py",
    "docs/workers.md": "docs/test_workers.py",
}
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
RUN = {
    name: path
    for name, path in PAGES.items()
    if name not in RUN_ELSEWHERE and any(block.runs for block in blocks(path.read_text(encoding="utf-8")))
}
#: Files of the reader's own that pages mention.
PASSAGES = [
    {
        "id": f"{number}",
        "genre": genre,
        "text": f"{name} took his hat from the table, and went out into the street.",
    }
    for number, (genre, name) in enumerate(
        [("novel", "Peter"), ("novel", "My uncle"), ("play", "The old man"), ("play", "He")]
    )
]


def can_run(block: Block) -> bool:
    """Return whether a block is one of those that `run_page` runs or writes."""
    return block.title is not None or block.kind in ("python", "sh")


@pytest.mark.parametrize("name", sorted(set(PAGES) - set(RUN_ELSEWHERE)))
def test_every_block_of_the_page_runs_or_is_marked(name: str) -> None:
    page = PAGES[name].read_text(encoding="utf-8")
    assert [block.code for block in blocks(page) if not (block.mark or can_run(block))] == []
    assert all(block.detail for block in blocks(page) if block.mark == NOT_RUN), (
        "say why a block does not run"
    )
    without_blocks = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"\n\n    (?! )[^\n]+", without_blocks) == [], "put code between fences"


def test_pages_that_are_run_elsewhere_exist_and_so_do_their_tests() -> None:
    assert set(RUN_ELSEWHERE) <= set(PAGES)
    assert all((TESTS / test).exists() for test in RUN_ELSEWHERE.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_page_runs_and_shows_what_it_prints(name: str, tmp_path: Path) -> None:
    for file in ("texts.jsonl", "books.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    different = [
        (output.shown.code, trimmed(output.text))
        for output in run_page(RUN[name].read_text(encoding="utf-8"), tmp_path)
        if not same_output(output.shown.code, trimmed(output.text))
    ]
    plugins.cache_clear()
    assert different == [], f"run: python -m tools.page_blocks {name}"
