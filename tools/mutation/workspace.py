"""Copies of the repository in which mutmut mutates one target and runs its tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


def run(workspace: Path, n_processes: int) -> int:
    """Let mutmut test all mutants of a workspace that it has no verdict of; return its exit code."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # The mutated modules come first in the path; an installed copy must not hide them in processes of tests.
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(n_processes)]
    with open(workspace / "mutmut.log", "w", encoding="utf-8") as log:
        return subprocess.run(
            command, cwd=workspace, env=environment, stdout=log, stderr=log, check=False
        ).returncode
