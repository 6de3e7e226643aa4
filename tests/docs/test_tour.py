"""The tour of a run, as a page and as a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_notebook_is_the_page() -> None:
    import nbformat
    from tools.notebooks import notebook

    path = DOCS / "tour.ipynb"
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in notebook("tour").cells
    ], "run python -m tools.notebooks tour"
    text = path.read_text(encoding="utf-8")
    assert str(path.parents[1]) not in text
    assert "<script" not in text


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
