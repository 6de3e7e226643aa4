"""Pages of docs/ that are notebooks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def stored_notebook(name: str) -> Any:
    """Return the notebook of a page, after checking that it is valid, is the page, and names no folder of a machine."""
    import nbformat
    from tools.notebooks import notebook

    path = DOCS / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in notebook(name).cells
    ], f"run python -m tools.notebooks {name}"
    assert str(DOCS.parent) not in path.read_text(encoding="utf-8")
    return stored
