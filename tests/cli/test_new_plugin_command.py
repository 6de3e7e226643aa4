"""`phaselens new-plugin` writes a package, and overwrites nothing."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from phaselens.plugin import CausalMetric
from phaselens.plugin.plugin_loading import LoadedPlugin
from tests.cli.conftest import ErrorLine, Phaselens

EXAMPLE = Path(__file__).parents[2] / "plugins" / "phaselens-example"


def test_a_package_is_written_whose_metric_has_the_name(phaselens: Phaselens, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    outcome = phaselens("new-plugin", "my-metric", folder)
    assert (outcome.code, outcome.err) == (0, "")
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == [
        ".github/workflows/ci.yml",
        ".gitignore",
        "README.md",
        "phaselens_my_metric.py",
        "pyproject.toml",
        "tests/test_phaselens_my_metric.py",
    ]
    assert all("$" not in (folder / name).read_text() for name in written[1:])
    ast.parse((folder / written[5]).read_text())
    assert "phaselens plugins check my-metric" in (folder / written[0]).read_text()
    assert "${{ matrix.python }}" in (folder / written[0]).read_text()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["phaselens"] == {"my-metric": "phaselens_my_metric"}
    assert [metric.name for metric in LoadedPlugin.by_path(folder / written[3]).metrics()] == ["my-metric"]


def test_a_causal_metric_is_written_on_request(phaselens: Phaselens, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    assert phaselens("new-plugin", "silence", folder, "--causal").code == 0
    (metric,) = LoadedPlugin.by_path(folder / "phaselens_silence.py").metrics()
    assert issubclass(metric, CausalMetric)
    assert "the loss without the value vectors" in (folder / "README.md").read_text()
    ast.parse((folder / "tests" / "test_phaselens_silence.py").read_text())


def test_the_example_package_has_the_layout_that_is_written(phaselens: Phaselens, tmp_path: Path) -> None:
    """The files are the same, and those that do not depend on the metric are equal."""
    phaselens("new-plugin", "example", tmp_path / "package")
    files = {
        folder: {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and "cache" not in str(path)
        }
        for folder in (tmp_path / "package", EXAMPLE)
    }
    assert files[EXAMPLE] - files[tmp_path / "package"] == {Path("LICENSE")}
    assert not files[tmp_path / "package"] - files[EXAMPLE]
    for name in (".gitignore", ".github/workflows/ci.yml"):
        written = (tmp_path / "package" / name).read_text()
        assert written.replace("check example", "check delimiter-sinks") == (EXAMPLE / name).read_text()
    projects = [tomllib.loads((folder / "pyproject.toml").read_text()) for folder in files]
    for project in projects:
        for key in ("description", "license", "license-files", "entry-points"):
            project["project"].pop(key, None)
    assert projects[0] == projects[1]


def test_the_folder_is_named_after_the_metric(
    phaselens: Phaselens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert phaselens("new-plugin", "norms").code == 0
    assert (tmp_path / "phaselens-norms" / "phaselens_norms.py").is_file()


@pytest.mark.parametrize("name", ["", "My-Metric", "a--b", "1st", "a b", "../a", "class"])
def test_an_invalid_name_is_refused(error_line: ErrorLine, tmp_path: Path, name: str) -> None:
    assert "use lowercase letters, digits and dashes" in error_line(2, "new-plugin", name, tmp_path / "x")


def test_a_name_that_is_taken_and_a_folder_with_files_are_refused(
    error_line: ErrorLine, tmp_path: Path
) -> None:
    assert "phaselens 0.1.0 has this name" in error_line(2, "new-plugin", "sinks", tmp_path / "x")
    (tmp_path / "file").write_text("mine")
    assert "is not an empty folder; choose another" in error_line(2, "new-plugin", "norms", tmp_path)
    assert "is not an empty folder; choose another" in error_line(2, "new-plugin", "norms", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
