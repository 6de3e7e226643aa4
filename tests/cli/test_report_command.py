"""`phaselens report` and `phaselens run --report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.slow
def test_a_run_with_a_directory_has_a_report(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["run", checkpoint, "-p", "bos-norm", "--texts", texts]
    result = phaselens(*arguments, "--out", tmp_path / "run", "--report", tmp_path / "first.html")
    assert result.code == 0
    assert f"the report is {tmp_path / 'first.html'}" in result.err
    assert "values by token" not in result.out
    result = phaselens("report", tmp_path / "run")
    assert (result.code, result.out) == (0, "")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "first.html").read_text(encoding="utf-8")
    assert 'id="texts"' in page
    assert "--report" in page  # the command


@pytest.mark.slow
def test_a_report_without_a_directory_can_leave_tokens_out(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["run", checkpoint, "-p", "bos-norm", "--texts", texts, "--token-texts", "0", "--quiet"]
    assert phaselens(*arguments, "--report", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="texts"' not in page
    assert "--token-texts 0" in page


@pytest.mark.parametrize(
    ("name", "problem"), [("report.pdf", "end in .html"), ("folder.html", "is a folder")]
)
def test_a_name_that_cannot_be_a_report_is_refused_before_anything_is_measured(
    name: str, problem: str, error_line: ErrorLine, tmp_path: Path
) -> None:
    (tmp_path / "folder.html").mkdir()
    assert problem in error_line(2, "run", "-p", "sinks", "--report", tmp_path / name)


def test_a_folder_without_a_run_has_no_report(error_line: ErrorLine, tmp_path: Path) -> None:
    assert "holds no run.json" in error_line(2, "report", tmp_path)
