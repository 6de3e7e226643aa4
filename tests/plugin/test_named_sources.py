"""Models, texts and commands by name, and metrics of a file; each error names the plugin that caused it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import phaselens
from phaselens.errors import InputError, ModelError
from phaselens.plugin import Plugins, plugins
from phaselens.runs.inputs import find_texts
from tests.distributions import Install
from tests.plugin.test_manager import GOOD
from tests.toys import letters

MODEL = """
from phaselens.plugin import NamedModel, hookimpl

def load():
    from tests.toys import toy_tokenizer
    from phaselens.testing import tiny_model
    {body}

@hookimpl
def phaselens_models():
    return [NamedModel("mine", load, "a tiny one")]
"""
TEXTS = """
from phaselens.plugin import NamedTexts, Text, hookimpl

def read():
    {body}

@hookimpl
def phaselens_texts():
    return [NamedTexts("mine", read)]
"""
COMMAND = """
import click
from phaselens.plugin import hookimpl

@hookimpl
def phaselens_commands(cli):
    @cli.command()
    @click.argument("word")
    def mine(word):
        click.echo(word.upper())

    @cli.command()
    def run():
        raise AssertionError("took a name that is taken")
"""


def test_texts_of_a_plugin_do_not_replace_the_bundled_ones(install: Install) -> None:
    install("bundled", TEXTS.format(body="return ['mine']").replace('"mine", read', '"bundled", read'))
    assert find_texts("bundled") is None
    assert find_texts("-") is None


def test_a_model_is_run_by_name(install: Install) -> None:
    install("mine", MODEL.format(body="return tiny_model('llama'), toy_tokenizer()"))
    run = phaselens.run("label=mine", metrics="sinks", texts=[letters(5), letters(9)])
    assert [model.info.label for model in run.models] == ["label"]
    assert run.models[0].info.family == "llama"


def test_a_model_of_an_unsupported_family_comes_with_its_adapter(install: Install) -> None:
    source = MODEL.format(
        body="""
    from transformers import LlamaForCausalLM
    model = tiny_model("llama")
    model.__class__ = type("FooForCausalLM", (LlamaForCausalLM,), {})
    return model, toy_tokenizer()

def adapter(configuration):
    from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
    return LlamaArchitectureAdapter(configuration)
"""
    )
    install("mine", source.replace('"a tiny one"', '"", {"FooForCausalLM": adapter}'))
    run = phaselens.run("mine", metrics="sinks", texts=[letters(5)])
    assert run.models[0].info.architecture == "FooForCausalLM"


def test_the_error_for_a_model_that_cannot_be_loaded_names_its_plugin(install: Install) -> None:
    install("mine", MODEL.format(body="raise OSError('no disk')"))
    with pytest.raises(
        ModelError,
        match=r"model 'mine': plugin 'mine' \(dist-mine 2\.5\) failed to load it: OSError: no disk",
    ):
        phaselens.run("mine", metrics="sinks", texts=["a"])
    with pytest.raises(InputError, match="offered by a plugin and has no revisions; leave @x out"):
        phaselens.run("mine@x", metrics="sinks", texts=["a"])


def test_a_folder_takes_precedence_over_a_plugin_of_its_name(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("mine", "raise AssertionError('imported')")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"the folder holds no config\.json"):
        phaselens.run("mine", metrics="sinks", texts=["a"])


def test_texts_are_read_by_name(install: Install) -> None:
    install("mine", TEXTS.format(body="return ['a b c', Text('named', 'd e')]"))
    (texts,) = [plugins().texts("mine")]
    assert texts is not None
    from tests.toys import toy_lens

    run = phaselens.run(toy_lens(), metrics="sinks", texts="mine")
    assert [text.id for text in run.texts] == ["0", "named"]
    assert run.options["texts"] == "mine"


def test_a_plugin_whose_texts_were_used_is_notified_of_the_end(install: Install) -> None:
    from tests.toys import toy_lens

    listener = "finished_runs = []\n@hookimpl\ndef phaselens_run_finished(run): finished_runs.append(run)\n"
    install("mine", TEXTS.format(body="return ['a b c']") + listener)
    run = phaselens.run(toy_lens(), metrics="sinks", texts="mine")
    assert sys.modules["dist_mine_mine"].finished_runs == [run]


def test_the_error_for_texts_that_cannot_be_read_names_their_plugin(install: Install) -> None:
    install("mine", TEXTS.format(body="raise SystemExit('gone')"))
    with pytest.raises(
        InputError, match=r"texts 'mine': plugin 'mine' \(dist-mine 2\.5\) failed: SystemExit: gone"
    ):
        phaselens.run("rope", metrics="sinks", texts="mine")


def test_a_plugin_that_offers_no_model_is_not_a_model(install: Install) -> None:
    install("mine", TEXTS.format(body="return ['a']"))
    assert Plugins().model("mine") is None
    assert Plugins().command("mine") is None
    with pytest.raises(InputError, match=r"it offers no metric of this name; .* offers none"):
        Plugins().metric("mine")


def test_a_wrong_kind_of_offer_is_an_error(install: Install) -> None:
    install("mine", MODEL.replace('NamedModel("mine", load, "a tiny one")', '"mine"').format(body="pass"))
    with pytest.raises(
        InputError, match=r"cannot be loaded: TypeError: 'mine' is not a phaselens\.plugin\.NamedModel"
    ):
        Plugins().model("mine")


def test_a_command_is_found_by_name_and_replaces_none(install: Install) -> None:
    from phaselens.cli.app import app

    install("mine", COMMAND)
    done = CliRunner().invoke(app, ["mine", "word"])
    assert (done.exit_code, done.output) == (0, "WORD\n")
    assert "Measure metrics on models" in CliRunner().invoke(app, ["run", "--help"]).output
    assert "dist_mine_mine" not in CliRunner().invoke(app, ["--help"]).output
    (plugin,) = [candidate for candidate in Plugins().check_all() if candidate.name == "mine"]
    assert plugin.offers == ("command",)


FILE = GOOD.split("@hookimpl")[0]


@pytest.mark.parametrize("source", [FILE, GOOD], ids=["a class", "a hook"])
def test_the_metrics_of_a_file_can_be_added(tmp_path: Path, source: str) -> None:
    path = tmp_path / "metric.py"
    path.write_text(source.format(name="once", offer="Good"))
    file = Plugins()
    assert file.add_file(str(path)) == ["once"]
    assert file.metric("once").name == "once"
    assert str(file.origin("once")) == f"'once' (file {path})"
    assert "once" in file.names
    assert "once" not in Plugins().names
    with pytest.raises(InputError, match=r"metric 'once' is in .* and in "):
        file.add_file(str(path))


def test_a_file_may_import_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_a_metric.py").write_text(FILE.format(name="base", offer=""))
    path = tmp_path / "metric.py"
    path.write_text("from beside_a_metric import Good\nclass Mine(Good):\n    name = 'mine'\n")
    assert Plugins().add_file(str(path)) == ["mine"]


def test_a_file_takes_precedence_over_an_installed_metric_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text(GOOD.format(name="sinks", offer="Good"))
    file = Plugins()
    file.add_file(str(path))
    assert file.origin("sinks").distribution == "file"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("none.py", None, "plugin file '.*none.py': there is no such file; name a Python file"),
        ("metric.txt", "", "plugin file '.*metric.txt': this is not a .py file; name a Python file"),
        ("metric.py", "import not_there", r"plugin 'metric' \(file .*\) cannot be loaded: ModuleNotFoundError"),
        ("metric.py", "x = 1", "cannot be loaded: LookupError: it defines no metric"),
    ],
)  # fmt: skip
def test_the_error_for_an_unusable_file_says_why(
    tmp_path: Path, name: str, source: str | None, message: str
) -> None:
    if source is not None:
        (tmp_path / name).write_text(source)
    with pytest.raises(InputError, match=message):
        Plugins().add_file(str(tmp_path / name))
