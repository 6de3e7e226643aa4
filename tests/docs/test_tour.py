"""The tour of a run, as a page and as a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.notebook_pages import DOCS, stored_notebook


def test_the_notebook_is_the_page() -> None:
    stored_notebook("tour")
    assert "<script" not in (DOCS / "tour.ipynb").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_and_shows_tables_and_figures(tmp_path: Path) -> None:
    from tools.notebooks import execute, notebook

    executed = execute(notebook("tour"), tmp_path)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [set(output["data"]) for output in outputs if "data" in output]
    assert ["text/html" in kind for kind in kinds] == [True, True, False, False]
    assert ["image/png" in kind for kind in kinds] == [False, False, True, True]
    assert (tmp_path / "norm.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "report.html").stat().st_size > 100_000
