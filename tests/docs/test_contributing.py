"""CONTRIBUTING names commands, tools and files that exist, and ends with a checklist for releases."""

from __future__ import annotations

import re

from tools.page_blocks import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_targets_tools_and_links_exist() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?<![\w-])make ([a-z][a-z-]*)", PAGE)):
        assert f"\n{target}:" in targets, target
    for module in set(re.findall(r"python -m (tools\.[\w.]+)", PAGE)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / link).exists(), link


def test_the_checklist_of_a_release_names_what_states_the_version() -> None:
    checklist = PAGE.partition("## Release")[2]
    steps = re.findall(r"^(\d+)\. ", checklist, re.MULTILINE)
    assert steps == [str(number) for number in range(1, len(steps) + 1)]
    for file in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        assert f"`{file}`" in checklist
        assert (ROOT / file).exists()
