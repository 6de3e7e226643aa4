"""What is published: an sdist, the wheel built from it, and the wheel in a fresh environment without the repository."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.environments import Environment

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(folder: Path, kind: str, output: Path) -> Path:
    """Build an sdist or a wheel of a source tree with the back end that pyproject.toml names, and return the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(output)]
    if find_spec("build") is not None:
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            f"--{kind}",
            "--outdir",
            str(output),
            str(folder),
        ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (built,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the unpacked sdist, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        # Python 3.11.3 and older have no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = folder.iterdir()
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_pinned_versions_support_the_oldest_python(constraints: str) -> None:
    oldest = min(specifier.version for specifier in SpecifierSet(PROJECT["requires-python"]))
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    installed = [
        found
        for found in distributions()
        if found.version in pinned.get(canonicalize_name(found.name), SpecifierSet("==0"))
    ]
    assert len(installed) > 20
    too_new = [
        f"{found.name} {found.version} needs Python {found.metadata['Requires-Python']}"
        for found in installed
        if not SpecifierSet(found.metadata["Requires-Python"] or "").contains(f"{oldest}.0")
    ]
    assert not too_new


@pytest.mark.slow
def test_the_wheel_has_what_a_user_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(metadata_name).decode())
    assert metadata["Version"] == PROJECT["version"]
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"phaselens", "phaselens_command", "phaselens_plugins"}
    for name in (
        "phaselens/py.typed",
        "phaselens/cli/template/metric.py.tmpl",
        "phaselens/cli/template/causal_metric.py.tmpl",
        "phaselens/data/texts/bundled.jsonl",
        "phaselens/data/models/rope/LICENSE",
        "phaselens/report/html/assets/report.html.j2",
    ):
        assert name in names
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".ipynb"))]
    assert set(PROJECT["optional-dependencies"]) - {"dev"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_the_wheel_runs_in_a_fresh_environment_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path / "fresh", isolated=True)
    fresh.install_wheel(wheel)
    where = fresh.run(
        "-c",
        "import phaselens, phaselens_plugins; print(phaselens.__file__, phaselens.__version__)",
        cwd=tmp_path,
    )
    file, version = where.split()
    assert Path(file).is_relative_to(tmp_path / "fresh")
    assert version == PROJECT["version"]
    program = str(fresh.bin / "phaselens")
    table = fresh.call([program, "run", "rope", "-p", "sinks", "--n-texts", "2"], cwd=tmp_path)
    assert "sink rate" in table
    fresh.call([program, "new-plugin", "residual-size"], cwd=tmp_path)
    package = tmp_path / "phaselens-residual-size"
    fresh.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    fresh.install(package, tmp_path)
    table = fresh.call([program, "run", "rope", "-p", "residual-size", "--n-texts", "2"], cwd=tmp_path)
    assert "norm of the residual stream" in table


def test_the_version_stands_in_one_place() -> None:
    """Other files that name a version are generated from, or checked against, pyproject.toml."""
    assert not [
        path
        for path in (ROOT / "src").rglob("*.py")
        if f'"{PROJECT["version"]}"' in path.read_text() or f"'{PROJECT['version']}'" in path.read_text()
    ]
    template = (ROOT / "src/phaselens/cli/template/pyproject.toml.tmpl").read_text()
    assert "phaselens>=$version" in template
