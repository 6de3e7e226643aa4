"""A plugin's package that lies in a folder and need not be installed: what its pyproject.toml declares."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from phaselens.errors import InputError
from phaselens.plugin.registry import GROUP


@dataclass(frozen=True)
class PackageFolder:
    """`root` is what must be importable from; `modules` holds the module of each declared plugin, by its name."""

    root: Path
    modules: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> PackageFolder:
        """What `folder` declares.

        Raises:
            InputError: without a readable pyproject.toml, an entry point, or the module that it names.
        """
        declared = folder / "pyproject.toml"
        if not declared.is_file():
            raise InputError(f"{folder}: no pyproject.toml in it; name a package's folder, or a .py file")
        try:
            project = tomllib.loads(declared.read_text(encoding="utf-8")).get("project", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{declared} cannot be read: {error}") from error
        modules = {
            str(name): str(module) for name, module in project.get("entry-points", {}).get(GROUP, {}).items()
        }
        if not modules:
            raise InputError(
                f'{declared} declares no plugin; add [project.entry-points.{GROUP}] with name = "module"'
            )
        roots = {module: _root(folder, module) for module in modules.values()}
        for module, root in roots.items():
            if root is None:
                raise InputError(
                    f"{declared} names the module {module!r}, which is neither in {folder} nor in its src"
                )
        return cls(next(root for root in roots.values() if root is not None), modules)


def _root(folder: Path, module: str) -> Path | None:
    place = Path(*module.split("."))
    for root in (folder, folder / "src"):
        if (root / place.with_suffix(".py")).is_file() or (root / place / "__init__.py").is_file():
            return root.resolve()
    return None
