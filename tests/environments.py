"""Fresh virtual environments for tests of packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path


class Environment:
    """A virtual environment with PhaseLens. It sees the packages of the running environment, so that nothing heavy is
    downloaded again; packages installed into it are not visible in the running one.

    With `isolated`, modules that PYTHONPATH names are not visible, so that PhaseLens is the one installed into it.
    """

    def __init__(self, folder: Path, *, isolated: bool = False) -> None:
        venv.create(folder, with_pip=False)
        self.isolated = isolated
        self.python = folder / "bin" / "python"
        self.bin = folder / "bin"
        site_packages = Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        )
        package_folders = dict.fromkeys(
            sysconfig.get_paths()[package_folder] for package_folder in ("purelib", "platlib")
        )
        # site.addsitedir, unlike a plain path, also reads the .pth files there: editable installs are made of them.
        (site_packages / "running.pth").write_text(
            "".join(
                f"import site; site.addsitedir({package_folder!r})\n" for package_folder in package_folders
            )
        )

    def run(self, *arguments: object, code: int = 0, cwd: Path | None = None) -> str:
        """Return stdout of this environment's Python, run with `arguments`."""
        return self.call([str(self.python), *map(str, arguments)], code, cwd)

    def call(self, command: list[str], code: int = 0, cwd: Path | None = None) -> str:
        """Return stdout of a command, with this environment's programs first."""
        variables = {**os.environ, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        if self.isolated:
            variables.pop("PYTHONPATH", None)
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=variables)
        assert process.returncode == code, process.stdout + process.stderr
        return process.stdout

    def phaselens(self, *arguments: object) -> str:
        """Return stdout of the command line, run in this environment."""
        return self.run("-c", "from phaselens.cli import main; main()", *arguments)

    def install(self, package: Path, cwd: Path) -> None:
        """Build and install a package from a copy, without the network."""
        copy = cwd / f"copy-{package.name}"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        self.run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", copy)

    def install_wheel(self, wheel: Path) -> None:
        """Install a wheel without its dependencies and without the network."""
        self.run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
