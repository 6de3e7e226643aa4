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
