"""`phaselens run --figures`."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaselens.cli.entry import run_to_exit_code
from tests.toys import save_checkpoint


@pytest.mark.slow
def test_figures_are_drawn_beside_the_results(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    save_checkpoint(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("a b c d\ne f g h i\n")
    folder = tmp_path / "figures"
    arguments = [
        "run",
        str(tmp_path / "model"),
        "-p",
        "bos-norm",
        "--texts",
        str(texts),
        "--figures",
        str(folder),
    ]
    assert run_to_exit_code(arguments) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.{form}" for name in ("bos-norm", "study-bos-norm") for form in ("png", "svg")}
    output = capsys.readouterr()
    assert "BOS norm" in output.out
    assert f"4 figures in {folder}" in output.err


def test_a_file_instead_of_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run_to_exit_code(["run", "-p", "bos-norm", "--figures", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--figure-width", "3.3in"], "name a folder with --figures"),
        (["--figures", "f", "--figure-width", "wide"], "write a number with in, cm, mm or pt"),
        (["--figures", "f", "--figure-format", "pdff"], "did you mean pdf"),
        (["--figures", "f", "--figure-format", ","], "names no format"),
    ],
)
def test_sizes_and_formats_are_checked_before_anything_is_measured(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_to_exit_code(["run", "-p", "bos-norm", *options]) == 2
    assert problem in capsys.readouterr().err
