"""The example package and one made by `new-plugin`, each installed into a fresh environment and run there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.environments import Environment
from tests.toys import letters, save_checkpoint

EXAMPLE = Path(__file__).parents[2] / "plugins" / "phaselens-example"

pytestmark = pytest.mark.slow


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
