"""The plugins of a package folder, as its pyproject.toml declares them; the package need not be installed."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from phaselens.errors import InputError
from phaselens.plugin.registry import GROUP


@dataclass(frozen=True)
class PackageFolder:
    """A package's plugins. `root` is the folder to import from; `modules` maps each plugin's name to its module."""

    root: Path
    modules: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> PackageFolder:
        """Read the plugins that `folder` declares.

        Raises:
            InputError: without a readable pyproject.toml, an entry point, or the module that it names.
        """
        pyproject = folder / "pyproject.toml"
        if not pyproject.is_file():
            raise InputError(f"{folder} has no pyproject.toml; give a package folder, or a .py file")
        try:
            project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{pyproject} cannot be read: {error}") from error
        modules = {
            str(name): str(module) for name, module in project.get("entry-points", {}).get(GROUP, {}).items()
        }
        if not modules:
            raise InputError(
                f'{pyproject} declares no plugin; add [project.entry-points.{GROUP}] with name = "module"'
            )
        roots = {module: _import_root(folder, module) for module in modules.values()}
        for module, root in roots.items():
            if root is None:
                raise InputError(
                    f"{pyproject} names the module {module!r}, which is neither in {folder} nor in its src"
                )
        return cls(next(root for root in roots.values() if root is not None), modules)


def _import_root(folder: Path, module: str) -> Path | None:
    path = Path(*module.split("."))
    for root in (folder, folder / "src"):
        if (root / path.with_suffix(".py")).is_file() or (root / path / "__init__.py").is_file():
            return root.resolve()
    return None
