"""Write the entry points of the working tree into a folder on the path, as an installation of it would.

python tools/gpu/register.py FOLDER
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def write_entry_points(folder: Path) -> None:
    """Write the metadata of pyproject.toml that finds metrics and commands."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    groups = {**project["entry-points"], "console_scripts": project["scripts"]}
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.3\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    write_entry_points(Path(sys.argv[1]))
