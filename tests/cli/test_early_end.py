"""What is complete is kept: damaged checkpoints are found first, and a run that ends early prints what it has."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import ModelError
from phaselens.plugin import plugins
from phaselens.runs import Observer
from tests.cli.conftest import Phaselens
from tests.toys import letters, save_in_hub_cache, toy_lens

Fails = Callable[..., str]


@pytest.fixture
def second(checkpoint: Path, tmp_path: Path) -> Path:
    """Another copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "second"))


def truncated(folder: Path, by: int = 10) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-by])


def headless(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x05")


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def appended(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as handle:
        handle.write(b"more")


def with_another_header(folder: Path, **changes: Any) -> None:
    """The same bytes under a header in which one tensor is said to be something else."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["lm_head.weight"].update(changes)
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])


def with_another_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def a_link_to_nowhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


def sharded(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    return index


def without_a_shard(folder: Path) -> None:
    (folder / sorted(set(sharded(folder)["weight_map"].values()))[-1]).unlink()


def with_a_cut_shard(folder: Path) -> None:
    file = folder / sorted(set(sharded(folder)["weight_map"].values()))[-1]
    file.write_bytes(file.read_bytes()[:-1])


def with_a_wrong_index(folder: Path) -> None:
    index = sharded(folder)
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(file for file in files if file != index["weight_map"][names[0]])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (truncated, "bytes where its header describes"),
    (headless, "fewer than its header takes"),
    (long_header, "fewer than its header takes"),
    (no_header, "its header cannot be read"),
    (appended, "bytes where its header describes"),
    (without_a_shard, "is named in model.safetensors.index.json and is not there"),
    (with_a_cut_shard, "bytes where its header describes"),
    (with_a_wrong_index, "which does not hold it"),
    (lambda folder: with_another_header(folder, shape=[1, 2]), "invalid shape, data type, or offset"),
    (lambda folder: with_another_header(folder, data_offsets=[8, 0]), "invalid offset for tensor"),
    (lambda folder: with_another_header(folder, dtype="Q3"), "unknown variant `Q3`"),
    (a_link_to_nowhere, "model.safetensors is no file, or a link that leads nowhere"),
    (lambda folder: with_another_config(folder, model_type="nonsense"), "`nonsense`"),
    (lambda folder: with_another_config(folder, num_hidden_layers="two"), "'num_hidden_layers'"),
    (without_a_tokenizer, "holds no tokenizer files; copy them there"),
    (lambda folder: (folder / "tokenizer.json").write_text("{oh"), "tokenizer.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("{oh"), "config.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "holds a JSON list and no object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors beside it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_second_model_is_found_before_the_first_is_measured(
    lens: Any, second: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(second)
    seen: list[str] = []

    class Watch(Observer):
        def measuring(self, label: str, n_tokens: int) -> None:
            seen.append(label)

    with pytest.raises(ModelError, match=f"model '{second}'.*{message}") as caught:
        phaselens.run([lens, second], metrics="sinks", texts=[letters(4)], observer=Watch())
    assert seen == []
    assert caught.value.run is None


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(label="whole")


def test_whole_checkpoints_in_shards_pass(lens: Any, second: Path) -> None:
    sharded(second)
    run = phaselens.run([lens, second], metrics="sinks", texts=[letters(4)])
    assert [model.info.label for model in run.models] == ["whole", "second"]


def test_a_stray_file_that_is_not_loaded_is_not_judged(second: Path) -> None:
    (second / "consolidated.safetensors").write_bytes(b"\x05")
    assert phaselens.run(second, metrics="sinks", texts=[letters(4)]).failed == []


def lose_a_tensor(folder: Path) -> None:
    """Leave a checkpoint whose files are whole and whose model is not."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_of_other_shapes_are_named_so(second: Path) -> None:
    with_another_config(second, intermediate_size=8)
    with pytest.raises(ModelError, match=r"its weights have other shapes than its config\.json says"):
        phaselens.load(second)


def test_a_model_that_fails_later_leaves_the_finished_ones(lens: Any, second: Path) -> None:
    lose_a_tensor(second)
    with pytest.raises(ModelError, match="lacks 1 of the model's tensors") as caught:
        phaselens.run([lens, second, "rope"], metrics=["sinks", "bos-norm"], texts=[letters(4), letters(9)])
    part = caught.value.run
    assert part is not None
    alone = phaselens.run(lens, metrics=["sinks", "bos-norm"], texts=[letters(4), letters(9)])
    for name, result in alone.metrics.items():
        assert part.metrics[name].tables == result.tables
    assert [(failure.model, failure.type) for failure in part.errors] == [
        ("second", "RefusedModel"),
        ("rope", "RefusedModel"),
    ]
    plain = json.loads(json.dumps(part.to_dict(), allow_nan=False))
    assert [error["model"] for error in plain["errors"]] == ["second", "rope"]
    assert "rope: not measured: the run ended before it" in plain["warnings"]
    assert [text["n_tokens_by_model"] for text in plain["texts"]] == [{"whole": 5}, {"whole": 10}]
    assert "errors" not in alone.to_dict()


def test_an_interrupt_leaves_the_finished_ones_and_no_half_of_another(lens: Any) -> None:
    other = toy_lens(label="other")

    class Stop(Observer):
        def measuring(self, label: str, n_tokens: int) -> None:
            if label == "other":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        phaselens.run([lens, other], metrics="sinks", texts=[letters(4)], observer=Stop())
    part: Any = caught.value.run  # type: ignore[attr-defined]
    assert [str(failure) for failure in part.errors] == ["other: not measured: interrupted"]
    assert set(part.table("sinks", "texts").column("model").to_pylist()) == {"whole"}


def test_an_interrupt_while_plugins_are_told_leaves_all(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, run: Any, names: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(plugins()), "run_finished", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        phaselens.run(lens, metrics="sinks", texts=[letters(4)])
    part: Any = caught.value.run  # type: ignore[attr-defined]
    assert ([model.info.label for model in part.models], part.errors) == (["whole"], [])


@pytest.mark.parametrize("form", ["json", "table", "csv", "markdown"])
def test_an_interrupt_in_the_middle_of_printing_leaves_the_output_whole(
    phaselens: Phaselens, checkpoint: Path, texts: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", checkpoint, "-p", "sinks", "--texts", texts, "--format", form)
    alone = phaselens(*arguments)
    module = sys.modules["phaselens.cli.run"]
    print_at_once = module._print_at_once

    def interrupted(*given: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        print_at_once(*given, **options)

    monkeypatch.setattr(module, "_print_at_once", interrupted)
    done = phaselens(*arguments)
    assert (done.code, done.out) == (130, alone.out)
    assert done.err.endswith("phaselens: error: interrupted\n")


@pytest.mark.parametrize("form", ["json", "table", "csv", "markdown"])
def test_the_command_prints_what_is_finished_and_exits_with_3(
    phaselens: Phaselens, checkpoint: Path, second: Path, texts: Path, form: str
) -> None:
    lose_a_tensor(second)
    arguments = ("-p", "sinks", "--texts", texts, "--format", form)
    done = phaselens("run", checkpoint, second, *arguments)
    assert done.code == 3
    assert done.err.startswith(f"phaselens: error: model '{second}': its checkpoint lacks 1 of")
    assert done.err.count("\n") == 1
    alone = phaselens("run", checkpoint, *arguments)
    if form == "json":
        found = json.loads(done.out)
        assert found["metrics"] == json.loads(alone.out)["metrics"]
        assert [error["model"] for error in found["errors"]] == ["second"]
    elif form == "csv":
        assert done.out == alone.out
    else:
        assert "second: not measured: " in done.out.replace("\n", " ").replace("\\", "")
        assert alone.out.splitlines()[2:8] == done.out.splitlines()[2:8]


def test_debug_prints_the_metrics_traceback(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    source = (
        "from phaselens.plugin import Column, Metric, TableSpec\n"
        "class Broken(Metric):\n"
        "    name, version = 'broken-{}', '1'\n"
        "    tables = (TableSpec('summary', (Column('x'),)),)\n"
        "    def hooks(self): return ['blocks.{layer}.hook_resid_post']\n"
        "    def update(self, layer): layer['attn.hook_z']\n"
        "    def compute(self): return {}\n"
    )
    outcomes = []
    for number, flags in enumerate([(), ("--debug",)]):
        file = tmp_path / f"broken_{number}.py"
        file.write_text(source.replace("{}", str(number)))
        outcomes.append(phaselens("run", checkpoint, "--plugin-file", file, "--texts", texts, *flags))
    plain, debug = outcomes
    assert plain.code == debug.code == 1
    assert plain.err.count("\n") == 1
    assert "Traceback" not in plain.err
    assert "add 'blocks.{layer}.attn.hook_z' to hooks()" in plain.err
    assert f"({tmp_path / 'broken_0.py'}:6)" in plain.err
    assert "Traceback (most recent call last):" in debug.err
    assert f'File "{file}", line 6, in update' in debug.err
    last = plain.err.rstrip("\n").replace("broken-0", "broken-1").replace("_0.py", "_1.py")
    assert debug.err.splitlines()[-1] == last


def test_a_metric_without_a_name_in_a_file_says_so(fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "nameless_metric.py"
    file.write_text(
        "from phaselens.plugin import Metric\n\n"
        "class Mine(Metric):\n    version = '1'\n    tables = ()\n"
        "    def hooks(self): return []\n    def update(self, layer): pass\n    def compute(self): return {}\n"
    )
    message = fails(2, "run", checkpoint, "--plugin-file", file)
    assert "Mine sets no `name` (str); write name =" in message
    assert f"({file}:3)" in message


STOPS_AT_THE_SECOND = """
import sys, time
from pathlib import Path
import phaselens.runs.api as api
from phaselens.cli import main
measure, marker = api.measure, Path(sys.argv.pop(1))

def waiting(lens, *args, **kwargs):
    if lens.info.label == "second":
        marker.write_text("reached")
        time.sleep(600)
    return measure(lens, *args, **kwargs)

api.measure = waiting
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "table"])
def test_ctrl_c_prints_the_models_that_are_finished(
    phaselens: Phaselens, checkpoint: Path, second: Path, texts: Path, tmp_path: Path, form: str
) -> None:
    marker = tmp_path / "marker"
    arguments = ["-p", "bos-norm", "--texts", str(texts), "--format", form]
    command = [sys.executable, "-c", STOPS_AT_THE_SECOND, str(marker), "run", str(checkpoint), str(second)]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not marker.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (130, "phaselens: error: interrupted\n")
    alone = phaselens("run", checkpoint, *arguments).out
    if form == "json":
        found = json.loads(out)
        assert found["metrics"] == json.loads(alone)["metrics"]
        assert found["errors"] == [{"model": "second", "type": "KeyboardInterrupt", "message": "interrupted"}]
    else:
        assert out.splitlines()[:6] == alone.splitlines()[:6]
        assert "second: not measured: interrupted" in out


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the models whose measurement began, in order."""
    module = sys.modules["phaselens.runs.api"]
    measure, labels = module.measure, []

    def noted(lens: Any, *arguments: Any, **options: Any) -> Any:
        labels.append(lens.info.label)
        return measure(lens, *arguments, **options)

    monkeypatch.setattr(module, "measure", noted)
    return labels


@pytest.mark.parametrize("form", ["json", "table"])
@pytest.mark.parametrize("kind", ["folder", "owner/second", "second"])
def test_the_command_finds_a_truncated_second_checkpoint_before_it_measures_the_first(
    phaselens: Phaselens, fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path, kind: str, form: str,
    measured: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Folders, and hub ids in the local cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = save_in_hub_cache(tmp_path, kind)
    second = str(files) if kind == "folder" else kind
    arguments = ("run", checkpoint, f"second={second}", "-p", "sinks", "--texts", texts, "--format", form)
    assert phaselens(*arguments).code == 0
    assert measured == ["tiny", "second"]
    measured.clear()
    truncated(files)
    message = fails(3, *arguments)
    assert f"model '{second}': its safetensors file cannot be read (model.safetensors: it has" in message
    assert message.endswith("it is truncated or damaged, fetch or copy it again")
    assert measured == []


HUB = """
import os, sys
from phaselens.cli import main
import socket
def refuse(*args, **kwargs): raise AssertionError("the network was touched")
socket.socket.connect = refuse
socket.create_connection = refuse
main()
"""


def hub(cache: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", HUB, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "label=gpt2", "gpt2@main"])
def test_gpt2_is_a_hub_id(tmp_path: Path, texts: Path, name: str) -> None:
    save_in_hub_cache(tmp_path / "hub", "gpt2", "gpt2")
    done = hub(tmp_path, "run", name, "-p", "sinks", "--texts", texts, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    (model,) = json.loads(done.stdout)["models"]
    assert model["family"] == "gpt2"
    assert model["label"] == ("label" if name.startswith("label") else "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hint"), [("gpt2", ""), ("ropee", "did you mean rope?"), ("tiny-model_1.5", "")]
)
def test_a_hub_id_that_is_not_cached_touches_no_network_offline(tmp_path: Path, name: str, hint: str) -> None:
    done = hub(tmp_path, "run", name, "-p", "sinks")
    assert done.returncode == 3
    assert done.stdout == ""
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert done.stderr.rstrip("\n").endswith(hint or "name a folder")


@pytest.mark.parametrize("name", ["no model", "a--b", "a..b", ".hidden", "-x", "x" * 97, "a/b c", "ends-"])
def test_what_cannot_be_a_hub_id_is_refused(fails: Fails, name: str) -> None:
    message = fails(3, "run", "-p", "sinks", "--", name)
    assert (
        "neither one of rope, drope, smollm2, nor a folder, nor a hub id" in message
        or "no such folder" in message
    )
