"""The documentation site has every page, and builds without a warning where mkdocs is installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
#: Pages that the build takes from the top of the repository.
FROM_TOP = {"index.md", "contributing.md", "changelog.md"}

#: Packages whose public names the reference of the API has.
PACKAGES = [
    "phaselens",
    "phaselens.attention",
    "phaselens.data",
    "phaselens.lens",
    "phaselens.patching",
    "phaselens.report.html",
    "phaselens.runs",
    "phaselens.spectrum",
    "phaselens.testing",
    "phaselens.uncertainty",
]


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning of the build is an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_a_network(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "make demo" in start
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = [
            part.split('"')[0] for part in page.split('src="')[1:] + page.split('rel="stylesheet" href="')[1:]
        ]
        assert [address for address in loaded if address.startswith(("http", "//"))] == [], path.name


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference_of_the_api(site: Path, package: str) -> None:
    """The names of `phaselens.plugin` are on a page of their own; tests/docs/test_reference.py compares it."""
    *_, entries = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split(" ")[0] for line in zlib.decompress(entries).decode().splitlines()}
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        member = getattr(module, name)
        paths = {f"{package}.{name}"}
        if hasattr(member, "__qualname__"):
            paths.add(f"{member.__module__}.{member.__qualname__}")
        assert paths & documented, name


@pytest.mark.parametrize("package", [*PACKAGES, "phaselens.plugin"])
def test_public_functions_have_a_text_with_shapes_of_tensors_and_errors(package: str) -> None:
    module = importlib.import_module(package)
    functions = [
        getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))
    ]
    texts = {function.__name__: inspect.getdoc(function) or "" for function in functions}
    assert [name for name, text in texts.items() if not text] == []
    of_tensors = [function.__name__ for function in functions if "Tensor" in str(inspect.signature(function))]
    assert [name for name in of_tensors if not re.search(r"\[[^\]]*\]", texts[name])] == []
    raising = [
        function.__name__
        for function in functions
        if re.search(r"^\s+raise \w", inspect.getsource(inspect.unwrap(function)), re.MULTILINE)
    ]
    silent = [name for name in raising if not re.search(r"Raises:|[Ee]rror", texts[name])]
    assert silent == [], "say which errors they raise"
