"""The bill of materials lists every bundled file with its hash and licence; licences and citation come with it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from tools.sbom import DATA, FILE, ROOT, main, model_component, sbom, text

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODELS = sorted(folder for folder in (DATA / "models").iterdir() if folder.is_dir())
TEXTS = {"MIT": "MIT License", "Apache-2.0": "Apache License"}


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run: python -m tools.sbom"


def test_every_bundled_file_is_listed_once() -> None:
    listed = [file["name"] for component in sbom()["components"] for file in component["components"]]
    bundled = [
        str(path.relative_to(ROOT))
        for folder in (*MODELS, DATA / "texts", DATA / "studies")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sorted(listed) == sorted(bundled)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_each_model_comes_with_the_text_of_its_licence(folder: Path) -> None:
    (licence,) = model_component(folder)["licenses"]
    assert TEXTS[licence["license"]["id"]] in (folder / "LICENSE").read_text(encoding="utf-8")
    assert licence["license"]["id"] in PROJECT["license"]


def test_a_model_without_a_licence_is_reported(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A model\n")
    with pytest.raises(ValueError, match="states no licence"):
        model_component(tmp_path)


def test_the_citation_has_the_name_version_and_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] in PROJECT["license"]
    assert citation["title"].startswith("PhaseLens")
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


def test_every_extra_is_documented_on_the_start_page() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in table, extra


def test_an_outdated_list_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.sbom.FILE", tmp_path / "sbom.cdx.json")
    monkeypatch.setattr("sys.argv", ["sbom", "--check"])
    assert main() == 1
    assert "python -m tools.sbom" in capsys.readouterr().err

    monkeypatch.setattr("sys.argv", ["sbom"])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["sbom", "--check"])
    assert main() == 0
    assert capsys.readouterr().err == ""
