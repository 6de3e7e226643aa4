"""The page on the architecture and CONTRIBUTING.md name files that exist, and the packages of the import contract."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
ARCHITECTURE = (ROOT / PAGES[0]).read_text(encoding="utf-8")
#: A path that a page shows as a pattern: the reader fills in the name.
PLACEHOLDERS = ("NAME", "*", "FAMILY", "tiny-model")


def paths_in(page: str) -> set[str]:
    """Return a page's paths in backticks, without the patterns."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([\w./*-]+/[\w./*-]*)`", text) if not path.startswith(".venv")}
    return {path for path in paths if not any(placeholder in path for placeholder in PLACEHOLDERS)}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_the_page_exists(page: str) -> None:
    paths = paths_in(page)
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_the_page_leads_to_a_file_and_a_heading(page: str) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([\w-]+))?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for target, anchor in links:
        file = (ROOT / page).parent / target
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_every_module_of_the_drawing_exists() -> None:
    drawing = ARCHITECTURE.split("```text")[1].split("```")[0]
    modules = re.findall(r"(?<![\w/])([a-z]+/(?:\w+\.py|phaselens_plugins/\w+\.py)?)", drawing)
    assert len(modules) >= 15
    for module in modules:
        assert (ROOT / "src" / "phaselens" / module).exists() or (ROOT / module).exists(), module


def test_the_packages_are_in_the_order_of_the_import_contract() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        contract for contract in config["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    ]
    expected = [package for layer in contract["layers"] for package in layer.split(" | ")]
    table = ARCHITECTURE.split("| package |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [package for cell in cells for package in re.findall(r"`([\w.]+)`", cell)] == expected


def test_every_make_target_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z]+)`", text))
    assert targets >= {"check", "format", "lint", "types", "contract", "quick", "test"}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
