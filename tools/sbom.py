"""Writes sbom.cdx.json: what is bundled with the package besides its code, with licences and hashes (CycloneDX 1.6).

python -m tools.sbom            rewrite the file
python -m tools.sbom --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "sbom.cdx.json"
DATA = ROOT / "src" / "phaselens" / "data"
#: Folders with bundled data that are not models: kind, licence, and what they are.
OTHERS = {
    "texts": ("data", "LicenseRef-public-domain", "60 passages of two books that are in the public domain"),
    "studies": ("data", "MIT", "published values, with their sources"),
}


def sbom() -> dict[str, Any]:
    """Return the bill of materials."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": name,
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{name}@{version}",
                "licenses": [{"expression": project["license"]}],
            }
        },
        "components": [
            *(model_component(folder) for folder in sorted((DATA / "models").iterdir()) if folder.is_dir()),
            *(_component(DATA / folder, *facts) for folder, facts in OTHERS.items()),
        ],
    }


def model_component(folder: Path) -> dict[str, Any]:
    """Return the entry of a bundled model, with the licence that its card states.

    Raises:
        ValueError: for a model whose card states no licence.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"^license: (\S+)$", card, re.MULTILINE)
    if stated is None:
        raise ValueError(f"{folder.name}/README.md states no licence")
    base = re.search(r"^base_model: (\S+)$", card, re.MULTILINE)
    what = f"a low-rank adapter for {base[1]}" if base else "a language model of 1.73 M parameters"
    licence = {"mit": "MIT", "apache-2.0": "Apache-2.0"}[stated[1]]
    return _component(folder, "machine-learning-model", licence, what)


def _component(folder: Path, kind: str, licence: str, description: str) -> dict[str, Any]:
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "__"))
    )
    stated = {"name": "public domain"} if licence.startswith("LicenseRef") else {"id": licence}
    return {
        "type": kind,
        "bom-ref": f"data/{folder.relative_to(DATA)}",
        "name": folder.name,
        "description": description,
        "licenses": [{"license": stated}],
        "components": [
            {
                "type": "file",
                "bom-ref": f"data/{path.relative_to(DATA)}",
                "name": str(path.relative_to(ROOT)),
                "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
            }
            for path in files
        ],
    }


def text() -> str:
    """Return the file's text."""
    return json.dumps(sbom(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Rewrite the file, or check it."""
    parser = argparse.ArgumentParser(description="The bill of materials of what is bundled")
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if FILE.exists() and FILE.read_text(encoding="utf-8") == text():
            return 0
        print(f"{FILE.name} does not list what is bundled. Run: python -m tools.sbom", file=sys.stderr)
        return 1
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
