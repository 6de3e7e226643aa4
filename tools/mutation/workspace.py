"""Copies of the repository in which mutmut mutates one target and runs its tests."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.mutation.targets import MutationTarget

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutation"
_COPIED = (
    "src",
    "plugins",
    "tests",
    "tools",
    "docs",
    "examples",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
)
#: Settings of coverage.py, which would follow each mutant.
_COVERAGE = re.compile(r"^\[tool\.coverage\..*?(?=^\[(?!tool\.coverage)|\Z)", re.DOTALL | re.MULTILINE)


class MutationError(Exception):
    """A line that says why mutants cannot be made, tested or shown, and what to do."""


def require_mutmut() -> None:
    """Raise MutationError if mutmut is not installed."""
    if importlib.util.find_spec("mutmut") is None:
        raise MutationError("mutmut is not installed; pip install -c constraints.txt -e '.[mutation]'")


def workspace_of(target: MutationTarget, folders: Sequence[Path]) -> Path:
    """Return the copy of the repository in which a target was run, from the first of `folders` that has one."""
    for folder in folders:
        if (folder / target.name / "mutants").is_dir():
            return folder / target.name
    raise MutationError(
        f"{target.name} has not been run in {', '.join(map(str, folders))}; "
        f"run python -m tools.mutation run {target.name}"
    )


def prepare(target: MutationTarget, folder: Path = FOLDER) -> Path:
    """Copy the repository for a target, keeping what mutmut has found out there of functions that have not changed."""
    workspace = folder / target.name
    workspace.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in _COPIED:
        source, copy = ROOT / name, workspace / name
        if copy.is_dir():
            shutil.rmtree(copy)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=ignore)
        elif source.exists():
            shutil.copyfile(source, copy)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (workspace / "pyproject.toml").write_text(
        _COVERAGE.sub("", settings) + _settings(target), encoding="utf-8"
    )
    return workspace


def _settings(target: MutationTarget) -> str:
    """Return mutmut's settings, as TOML."""
    values = {
        "source_paths": ["src", "plugins"],
        "only_mutate": list(target.modules),
        "pytest_add_cli_args_test_selection": list(target.tests),
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", "not slow"],
        "also_copy": [name for name in _COPIED if name not in ("src", "plugins", "tests")],
    }
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    return "\n".join(
        ["", "[tool.mutmut]", *lines, "track_dependencies = false", "use_git_change_detection = false", ""]
    )


def run(workspace: Path, n_processes: int) -> None:
    """Let mutmut test all mutants of a workspace that it has no verdict of.

    Raises:
        MutationError: if mutmut fails, as it does if a test fails without any mutant.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # The mutated modules come first in the path; an installed copy must not hide them in processes of tests.
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(n_processes)]
    log_file = workspace / "mutmut.log"
    with open(log_file, "w", encoding="utf-8") as log:
        code = subprocess.run(
            command, cwd=workspace, env=environment, stdout=log, stderr=log, check=False
        ).returncode
    if code:
        raise MutationError(f"{workspace.name}: mutmut ended with exit code {code}; see {log_file}")
