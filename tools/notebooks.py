"""Write docs/patching.ipynb and docs/tour.ipynb: the text and the code of a page as an executed notebook.

python -m tools.notebooks [PAGE...]
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("patching", "tour")
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def notebook(page: str) -> NotebookNode:
    """Return a page's cells, not executed. Their ids are their indices, so that they are the same each time."""
    import nbformat

    cells = []
    # The split puts code at odd indices.
    for index, block in enumerate(_BLOCK.split((DOCS / f"{page}.md").read_text(encoding="utf-8"))):
        text = block.strip("\n")
        if text:
            new_cell = nbformat.v4.new_code_cell if index % 2 else nbformat.v4.new_markdown_cell
            cells.append(new_cell(text, id=f"cell-{index}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(page: NotebookNode, folder: str | Path) -> NotebookNode:
    """Run all cells in `folder`, into which they write their files. An error in a cell is raised."""
    from nbclient import NotebookClient

    client = NotebookClient(
        page,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def write(page: str) -> None:
    """Write a page's notebook with the output of its cells."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        executed = execute(notebook(page), folder)
    for cell in executed.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings of libraries about this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    executed.metadata.pop("language_info", None)  # this machine's Python
    nbformat.write(executed, DOCS / f"{page}.ipynb")


if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        write(name)
