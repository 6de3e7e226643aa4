"""Write docs/patching.ipynb: the text and the code of docs/patching.md as an executed notebook.

python -m tools.patching_notebook
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "patching.md", DOCS / "patching.ipynb"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def notebook() -> NotebookNode:
    """Return the page's cells, not executed. Their ids are their indices, so that they are the same each time."""
    import nbformat

    cells = []
    # The split puts code at odd indices.
    for index, block in enumerate(_BLOCK.split(PAGE.read_text(encoding="utf-8"))):
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


def main() -> None:
    """Write the notebook with the output of its cells."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        executed = execute(notebook(), folder)
    for cell in executed.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings of libraries about this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    executed.metadata.pop("language_info", None)  # this machine's Python
    nbformat.write(executed, NOTEBOOK)


if __name__ == "__main__":
    main()
