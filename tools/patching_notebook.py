"""The tour of docs/patching.md as a notebook, docs/patching.ipynb: the same words and the same code, executed.

python -m tools.patching_notebook
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "patching.md", DOCS / "patching.ipynb"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def notebook() -> Any:
    """The page's cells, not executed. Their ids are their places, so that it is always the same."""
    import nbformat

    made = nbformat.v4.new_notebook()
    # Code stands at odd places.
    for place, part in enumerate(_BLOCK.split(PAGE.read_text(encoding="utf-8"))):
        text = part.strip("\n")
        if text:
            new = nbformat.v4.new_code_cell if place % 2 else nbformat.v4.new_markdown_cell
            made.cells.append(new(text, id=f"cell-{place}"))
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return made


def execute(made: Any, folder: str | Path) -> Any:
    """Run all cells, files going into `folder`. An error in one of them is raised."""
    from nbclient import NotebookClient

    client = NotebookClient(
        made, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def main() -> None:
    """Write the notebook, with what its cells print."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        made = execute(notebook(), folder)
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # what libraries have to say of this machine
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    made.metadata.pop("language_info", None)  # this machine's Python
    nbformat.write(made, NOTEBOOK)


if __name__ == "__main__":
    main()
