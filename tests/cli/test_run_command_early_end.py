"""Early ends of a run: damaged checkpoints are found first, and finished models are printed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

import phaselens
from phaselens.cli.output import Output
from phaselens.errors import ModelError
from phaselens.plugin import plugins
from phaselens.runs import Observer, Run
from tests.cli.conftest import ErrorLine, Phaselens
from tests.toys import letters, save_in_hub_cache, toy_lens


@pytest.fixture
def second(checkpoint: Path, tmp_path: Path) -> Path:
    """A second copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "second"))


def truncated(folder: Path, n_bytes: int = 10) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-n_bytes])


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
    """Replace the header by one that describes one tensor wrongly; the bytes stay the same."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["lm_head.weight"].update(changes)
    new_header = json.dumps(header).encode()
    new_header += b" " * (-len(new_header) % 8)
    file.write_bytes(len(new_header).to_bytes(8, "little") + new_header + content[end:])


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
    (truncated, "bytes; its header describes"),
    (headless, "too few for its header"),
    (long_header, "too few for its header"),
    (no_header, "its header cannot be read"),
    (appended, "bytes; its header describes"),
    (without_a_shard, "is named in model.safetensors.index.json and is missing"),
    (with_a_cut_shard, "bytes; its header describes"),
    (with_a_wrong_index, "which does not hold it"),
    (lambda folder: with_another_header(folder, shape=[1, 2]), "invalid shape, data type, or offset"),
    (lambda folder: with_another_header(folder, data_offsets=[8, 0]), "invalid offset for tensor"),
    (lambda folder: with_another_header(folder, dtype="Q3"), "unknown variant `Q3`"),
    (a_link_to_nowhere, "model.safetensors is not a file, or a link to a missing one"),
    (lambda folder: with_another_config(folder, model_type="nonsense"), 'model_type "nonsense"'),
    (
        lambda folder: with_another_config(folder, num_hidden_layers="two"),
        'num_hidden_layers "two"; it should be',
    ),
    (without_a_tokenizer, "holds no tokenizer files; copy them there"),
    (lambda folder: (folder / "tokenizer.json").write_text("{oh"), "tokenizer.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("{oh"), "config.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "holds a JSON list instead of an object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors;"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_second_model_is_found_before_the_first_is_measured(
    lens: Any, second: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(second)
    measured_labels: list[str] = []

    class Watch(Observer):
        def measuring(self, label: str, n_tokens: int) -> None:
            measured_labels.append(label)

    with pytest.raises(ModelError, match=f"model '{second}'.*{message}") as caught:
        phaselens.run([lens, second], metrics="sinks", texts=[letters(4)], observer=Watch())
    assert measured_labels == []
    assert caught.value.run is None


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(label="whole")


@pytest.mark.slow
def test_intact_sharded_checkpoints_pass(lens: Any, second: Path) -> None:
    sharded(second)
    run = phaselens.run([lens, second], metrics="sinks", texts=[letters(4)])
    assert [model.info.label for model in run.models] == ["whole", "second"]


def test_a_stray_file_that_is_not_loaded_is_not_checked(second: Path) -> None:
    (second / "consolidated.safetensors").write_bytes(b"\x05")
    assert phaselens.run(second, metrics="sinks", texts=[letters(4)]).failed == []


def lose_a_tensor(folder: Path) -> None:
    """Remove a tensor so that the files are intact but the model is incomplete."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_of_wrong_shapes_are_reported_as_such(second: Path) -> None:
    with_another_config(second, intermediate_size=8)
    with pytest.raises(ModelError, match=r"its weights have other shapes than its config\.json says"):
        phaselens.load(second)


def test_a_later_failure_keeps_the_finished_models(lens: Any, second: Path) -> None:
    lose_a_tensor(second)
    with pytest.raises(ModelError, match="lacks 1 of the model's tensors") as caught:
        phaselens.run([lens, second, "rope"], metrics=["sinks", "bos-norm"], texts=[letters(4), letters(9)])
    partial_run = caught.value.run
    assert partial_run is not None
    complete_run = phaselens.run(lens, metrics=["sinks", "bos-norm"], texts=[letters(4), letters(9)])
    for name, result in complete_run.metrics.items():
        assert partial_run.metrics[name].tables == result.tables
    assert [(failure.model, failure.type) for failure in partial_run.errors] == [
        ("second", "RefusedModel"),
        ("rope", "RefusedModel"),
    ]
    record = json.loads(json.dumps(partial_run.to_dict(), allow_nan=False))
    assert [error["model"] for error in record["errors"]] == ["second", "rope"]
    assert "rope: not measured: the run ended before it" in record["warnings"]
    assert [text["n_tokens_by_model"] for text in record["texts"]] == [{"whole": 5}, {"whole": 10}]
    assert "errors" not in complete_run.to_dict()


def test_an_interrupt_keeps_the_finished_models_and_no_partial_one(lens: Any) -> None:
    second_lens = toy_lens(label="other")

    class InterruptingObserver(Observer):
        def measuring(self, label: str, n_tokens: int) -> None:
            if label == "other":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        phaselens.run(
            [lens, second_lens], metrics="sinks", texts=[letters(4)], observer=InterruptingObserver()
        )
    partial_run: Any = caught.value.run  # type: ignore[attr-defined]
    assert [str(failure) for failure in partial_run.errors] == ["other: not measured: interrupted"]
    assert set(partial_run.table("sinks", "texts").column("model").to_pylist()) == {"whole"}


def test_an_interrupt_while_plugins_are_notified_keeps_all_models(
    lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, run: Any, names: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(plugins()), "notify_run_finished", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        phaselens.run(lens, metrics="sinks", texts=[letters(4)])
    partial_run: Any = caught.value.run  # type: ignore[attr-defined]
    assert ([model.info.label for model in partial_run.models], partial_run.errors) == (["whole"], [])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "table", "csv", "markdown"])
def test_an_interrupt_during_printing_does_not_cut_the_output(
    phaselens: Phaselens, checkpoint: Path, texts: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", checkpoint, "-p", "sinks", "--texts", texts, "--format", form)
    uninterrupted = phaselens(*arguments)
    write = Output.write_to

    def interrupted(output: Output, run: Run, file: IO[str]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(output, run, file)

    monkeypatch.setattr(Output, "write_to", interrupted)
    interrupted_result = phaselens(*arguments)
    assert (interrupted_result.code, interrupted_result.out) == (130, uninterrupted.out)
    assert interrupted_result.err.endswith("phaselens: error: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "table", "csv", "markdown"])
def test_the_command_prints_the_finished_models_and_exits_with_3(
    phaselens: Phaselens, checkpoint: Path, second: Path, texts: Path, form: str
) -> None:
    lose_a_tensor(second)
    arguments = ("-p", "sinks", "--texts", texts, "--format", form)
    result = phaselens("run", checkpoint, second, *arguments)
    assert result.code == 3
    assert result.err.startswith(f"phaselens: error: model '{second}': its checkpoint lacks 1 of")
    assert result.err.count("\n") == 1
    first_model_result = phaselens("run", checkpoint, *arguments)
    if form == "json":
        record = json.loads(result.out)
        assert record["metrics"] == json.loads(first_model_result.out)["metrics"]
        assert [error["model"] for error in record["errors"]] == ["second"]
    elif form == "csv":
        assert result.out == first_model_result.out
    else:
        assert "second: not measured: " in result.out.replace("\n", " ").replace("\\", "")
        assert first_model_result.out.splitlines()[2:8] == result.out.splitlines()[2:8]


@pytest.mark.slow
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
    without_debug, debug = outcomes
    assert without_debug.code == debug.code == 1
    assert without_debug.err.count("\n") == 1
    assert "Traceback" not in without_debug.err
    assert "add 'blocks.{layer}.attn.hook_z' to hooks()" in without_debug.err
    assert f"({tmp_path / 'broken_0.py'}:6)" in without_debug.err
    assert "Traceback (most recent call last):" in debug.err
    assert f'File "{file}", line 6, in update' in debug.err
    last_line = without_debug.err.rstrip("\n").replace("broken-0", "broken-1").replace("_0.py", "_1.py")
    assert debug.err.splitlines()[-1] == last_line


def test_a_metric_without_a_name_in_a_file_is_an_error(
    error_line: ErrorLine, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "nameless_metric.py"
    file.write_text(
        "from phaselens.plugin import Metric\n\n"
        "class Mine(Metric):\n    version = '1'\n    tables = ()\n"
        "    def hooks(self): return []\n    def update(self, layer): pass\n    def compute(self): return {}\n"
    )
    message = error_line(2, "run", checkpoint, "--plugin-file", file)
    assert "Mine sets no `name` (str); write name =" in message
    assert f"({file}:3)" in message


STOPS_AT_THE_SECOND = """
import sys, time
from pathlib import Path
import phaselens.runs.measurement as measurement
from phaselens.cli import main
measure, marker = measurement.measure_loaded, Path(sys.argv.pop(1))

def waiting(model, *args, **kwargs):
    if model.lens.info.label == "second":
        marker.write_text("reached")
        time.sleep(600)
    return measure(model, *args, **kwargs)

measurement.measure_loaded = waiting
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "table"])
def test_ctrl_c_prints_the_finished_models(
    checkpoint: Path, second: Path, texts: Path, tmp_path: Path, form: str
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
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "phaselens: error: interrupted\n")
    # In another process too: threads and kernels round differently in this one.
    main = [sys.executable, "-c", "from phaselens.cli import main; main()"]
    first_model_output = subprocess.run(
        [*main, "run", str(checkpoint), *arguments], capture_output=True, text=True, check=True
    ).stdout
    if form == "json":
        record = json.loads(output)
        assert record["metrics"] == json.loads(first_model_output)["metrics"]
        assert record["errors"] == [
            {"model": "second", "type": "KeyboardInterrupt", "message": "interrupted"}
        ]
    else:
        assert output.splitlines()[:6] == first_model_output.splitlines()[:6]
        assert "second: not measured: interrupted" in output


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the models whose measurement began, in order."""
    module = sys.modules["phaselens.runs.measurement"]
    measure, labels = module.measure_loaded, []

    def record_call(model: Any, *arguments: Any, **options: Any) -> Any:
        labels.append(model.lens.info.label)
        return measure(model, *arguments, **options)

    monkeypatch.setattr(module, "measure_loaded", record_call)
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "table"])
@pytest.mark.parametrize("weight_format", ["folder", "owner/second", "second"])
def test_the_command_finds_a_truncated_second_checkpoint_before_it_measures_the_first(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, texts: Path, tmp_path: Path, weight_format: str,
    form: str, measured: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Test folders, and hub ids in the local cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = save_in_hub_cache(tmp_path, weight_format)
    second = str(files) if weight_format == "folder" else weight_format
    arguments = ("run", checkpoint, f"second={second}", "-p", "sinks", "--texts", texts, "--format", form)
    assert phaselens(*arguments).code == 0
    assert measured == ["tiny", "second"]
    measured.clear()
    truncated(files)
    message = error_line(3, *arguments)
    assert f"model '{second}': its safetensors file cannot be read (model.safetensors: it has" in message
    assert message.endswith("it is truncated or damaged, fetch or copy it again")
    assert measured == []
