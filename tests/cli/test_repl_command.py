"""`phaselens repl`: help, errors before the shell opens, and models from the hub."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.toys import save_in_hub_cache


def test_help_imports_neither_ipython_nor_torch():
    code = (
        "import sys\nfrom phaselens.cli.app import app\n"
        "try: app(['repl', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('IPython', 'torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.endswith("[]\n")


def test_help_describes_what_the_command_opens():
    from phaselens.cli.app import app

    help_output = CliRunner().invoke(app, ["repl", "--help"])
    assert help_output.exit_code == 0
    assert "Patch activations by hand, in IPython." in help_output.output


def test_a_missing_model_is_an_error_before_ipython_starts(tmp_path):
    from phaselens.cli.entry import run_to_exit_code

    assert run_to_exit_code(["repl", str(tmp_path / "nothing")]) == 3
    assert run_to_exit_code(["repl", "rope", "--positions", "other=nope"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "label"), [("gpt2", "gpt2"), ("mine=gpt2@main", "mine")])
def test_a_hub_id_without_an_owner_opens_a_session(argument, label, tmp_path, monkeypatch):
    """The model comes from a cache, and the shell is a stand-in."""
    from phaselens.cli.entry import run_to_exit_code

    opened = {}

    class FakeShell:
        def __init__(self, session, loads, **options):
            opened.update(models=session.models, loads=loads, **options)

        def show_banner(self):
            opened["shown"] = True

        def mainloop(self):
            opened["ran"] = True

    monkeypatch.setattr("phaselens.repl.shell.make_shell", FakeShell)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_in_hub_cache(tmp_path, "gpt2", "gpt2")
    assert run_to_exit_code(["repl", argument]) == 0
    assert (list(opened["models"]), opened["shown"], opened["ran"]) == ([label], True, True)
    assert opened["models"][label].info.source == "gpt2"
    assert opened["banner"].startswith(f"{label}: GPT2LMHeadModel, 2 layers")
    extra = "" if label == "gpt2" else ", label='mine', revision='main'"
    assert opened["loads"] == {label: f"phaselens.load('gpt2'{extra})"}


def test_the_error_for_a_hub_id_that_is_not_cached_is_one_line(tmp_path, monkeypatch, capsys):
    from phaselens.cli.entry import run_to_exit_code

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run_to_exit_code(["repl", "gpt2"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("phaselens: error: model 'gpt2': neither one of")
    assert "nor a hub id in the local cache, and HF_HUB_OFFLINE is set" in captured.err
    assert captured.err.count("\n") == 1


def test_the_overrides_of_a_run_apply_to_models_of_a_session(tmp_path, monkeypatch):
    from phaselens.cli.entry import run_to_exit_code
    from phaselens.testing import tiny_model

    opened = {}

    class SilentShell:
        def __init__(self, session, loads, **options):
            opened.update(info=session.models["tiny"].info, loads=loads)

        def show_banner(self):
            pass

        def mainloop(self):
            pass

    monkeypatch.setattr("phaselens.repl.shell.make_shell", SilentShell)
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    overrides = ["--softmax-scale", "tiny=0.5", "--rope-scaling", "tiny=yarn:4"]
    assert run_to_exit_code(["repl", str(tmp_path / "tiny"), *overrides]) == 0
    assert (opened["info"].softmax_scale, opened["info"].rope_scaling) == (0.5, "yarn:4")
    assert opened["loads"]["tiny"].endswith("softmax_scale=0.5, rope_scaling='yarn:4')")
    assert run_to_exit_code(["repl", str(tmp_path / "tiny"), "--softmax-scale", "other=0.5"]) == 2
