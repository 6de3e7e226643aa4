"""The layout of tests/ mirrors src/, plugins/, tools/ and docs/."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "phaselens"
FOLDERS = sorted(
    folder.name for folder in TESTS.iterdir() if folder.is_dir() and folder.name != "__pycache__"
)


def module_names(folder: Path) -> set[str]:
    """Modules and packages of a folder, without their leading underscores."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem.lstrip("_") for path in folder.glob("*.py") if path.stem != "__init__"}


def subjects(folder: str) -> set[str]:
    """Names of which each test file in a folder of tests/ has one."""
    if folder == "docs":
        pages = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "mkdocs.yml")
        return {path.stem.lower() for path in pages}
    if folder == "plugins":
        return {
            *module_names(ROOT / "plugins" / "phaselens_plugins"),
            "phaselens_plugins",
            "phaselens_example",
        }
    if folder == "fuzz":
        return {name for name in module_names(TESTS / folder) if not name.startswith("test_")}
    if folder == "tools":
        return module_names(ROOT / "tools")
    if folder == "traps":
        return module_names(ROOT / "tools" / "traps")
    return module_names(SOURCE / folder)


def misnamed(folder: Path, subjects: set[str]) -> list[str]:
    """Test files of a folder that are not named `test_SUBJECT.py` or `test_SUBJECT_….py`."""
    stems = [path.stem for path in sorted(folder.glob("test_*.py"))]
    return [
        stem for stem in stems if not any(f"{stem}_".startswith(f"test_{subject}_") for subject in subjects)
    ]


def test_each_folder_of_tests_mirrors_a_package_and_each_package_has_one() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(FOLDERS) == packages | {"plugins", "tools", "docs", "traps", "fuzz"}


def test_no_test_file_lies_deeper() -> None:
    assert {path.parent.parent for path in TESTS.glob("*/**/test_*.py")} == {TESTS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_test_file_is_named_after_its_module(folder: str) -> None:
    assert misnamed(TESTS / folder, subjects(folder)) == []


def test_each_top_level_test_file_is_named_after_a_top_level_module_or_phaselens() -> None:
    top_level_modules = {path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"}
    assert misnamed(TESTS, top_level_modules | {"phaselens"}) == []


def test_a_name_that_is_not_a_module_is_detected(tmp_path: Path) -> None:
    for name in ("rows", "rows_of_texts", "rowset", "other"):
        (tmp_path / f"test_{name}.py").touch()
    assert misnamed(tmp_path, {"rows"}) == ["test_other", "test_rowset"]
