"""The example package and one made by `new-plugin`, each installed into a fresh environment and run there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.toys import letters, save_checkpoint

EXAMPLE = Path(__file__).parents[2] / "plugins" / "phaselens-example"

pytestmark = pytest.mark.slow


class Environment:
    """A virtual environment with PhaseLens. It sees the packages of the running environment, so that nothing heavy is
    downloaded again; packages installed into it are not visible in the running one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
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
        command = [str(self.python), *map(str, arguments)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
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


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environments") / "fresh")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def plugins(environment: Environment) -> dict[str, dict[str, object]]:
    return {plugin["name"]: plugin for plugin in json.loads(environment.phaselens("plugins", "--json"))}


def test_the_example_is_installed_listed_and_run(
    fresh: Environment, checkpoint: Path, tmp_path: Path
) -> None:
    fresh.install(EXAMPLE, tmp_path)
    plugin = plugins(fresh)["delimiter-sinks"]
    assert (plugin["status"], plugin["distribution"], plugin["version"]) == (
        "ok",
        "phaselens-example",
        "0.1.0",
    )
    assert "characters that a delimiter token consists of" in fresh.phaselens(
        "plugins", "show", "delimiter-sinks"
    )

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([letters(9), letters(12, 3)]))
    output = json.loads(
        fresh.phaselens(
            "run", checkpoint, "-p", "delimiter-sinks", "--delimiters", "hq", "--texts", texts, "--format", "json"
        )
    )  # fmt: skip
    result = output["metrics"]["delimiter-sinks"]
    assert (result["status"], result["distribution"]) == ("ok", "phaselens-example 0.1.0")
    columns = [column["name"] for column in result["tables"]["layers"]["columns"]]
    rows = [dict(zip(columns, row, strict=True)) for row in result["tables"]["layers"]["rows"]]
    assert len(rows) == 2
    assert all(0 < row["null"] < 1 and 0 < row["score"] < 1 for row in rows)


def test_the_tests_of_the_example_pass(fresh: Environment, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    fresh.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["observational", "causal"])
def test_a_new_plugin_passes_its_tests_at_once_and_appears_when_installed(
    fresh: Environment, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "norms"
    name = f"residual-{kind}"
    fresh.phaselens("new-plugin", name, folder, *(["--causal"] if kind == "causal" else []))
    fresh.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert name not in plugins(fresh)
    fresh.install(folder, tmp_path)
    assert plugins(fresh)[name]["status"] == "ok"
    assert sys.prefix not in str(plugins(fresh)[name])
