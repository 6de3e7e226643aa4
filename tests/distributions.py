"""Plugin distributions, laid out as pip installs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from phaselens.plugin import plugins

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a distribution with one plugin on the path; clear the plugin cache around it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules: list[str] = []

    def install_plugin(
        name: str,
        source: str,
        *,
        distribution: str | None = None,
        requires: str = "",
        value: str | None = None,
    ) -> None:
        distribution = distribution or f"dist-{name}"
        module = f"{distribution}_{name}".replace("-", "_")
        (site / f"{module}.py").write_text(dedent(source))
        folder = site / f"{distribution.replace('-', '_')}-2.5.dist-info"
        folder.mkdir()
        requirement = f"Requires-Dist: {requires}\n" if requires else ""
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n{requirement}"
        )
        (folder / "entry_points.txt").write_text(f"[phaselens]\n{name} = {value or module}\n")
        modules.append(module)
        plugins.cache_clear()

    yield install_plugin
    plugins.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)
