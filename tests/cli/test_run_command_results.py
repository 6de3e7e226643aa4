"""Complete commands on a tiny checkpoint: stdout, stderr and the exit code."""

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from phaselens.plugin import Plugins, Table
from tests.cli.conftest import ErrorLine, Phaselens
from tests.runs.metrics import probe


def fail(*args: object) -> Mapping[str, Table]:
    raise ZeroDivisionError("its own fault")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric named `broken` whose results cannot be computed."""
    metric = probe(name="broken", compute=fail)
    find = Plugins.metric
    origin = Plugins.origin
    monkeypatch.setattr(
        Plugins, "metric", lambda self, name: metric if name == "broken" else find(self, name)
    )
    monkeypatch.setattr(
        Plugins, "origin", lambda self, name: origin(self, "sinks" if name == "broken" else name)
    )


def test_json_is_all_that_is_on_stdout(phaselens: Phaselens, checkpoint: Path, texts: Path) -> None:
    outcome = phaselens("run", checkpoint, "-p", "sinks", "--texts", texts, "--format", "json")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    record = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(name))
    assert record["schema"] == "phaselens.run/1"
    assert [model["label"] for model in record["models"]] == ["tiny"]
    assert [text["id"] for text in record["texts"]] == ["four:1", "four:2", "four:3", "four:4"]
    assert record["metrics"]["sinks"]["status"] == "ok"


@pytest.mark.slow
def test_the_table_compares_models_side_by_side(phaselens: Phaselens, checkpoint: Path, texts: Path) -> None:
    outcome = phaselens(
        "run", f"rope={checkpoint}", f"nulled={checkpoint}", "-p", "sinks", "--texts", texts,
        "--positions", "nulled=nope", "--threshold", "0.2",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["│", "rope", "│", "nulled"] in lines
    positions = [line[-2] for line in lines if line[:1] in (["rope"], ["nulled"])]
    assert positions == ["rope", "nope"]
    assert "score ≥ 0.2" in outcome.out
    assert "\x1b" not in outcome.out


@pytest.mark.slow
def test_csv_and_markdown_hold_the_same_layers(phaselens: Phaselens, checkpoint: Path, texts: Path) -> None:
    arguments = ("run", checkpoint, "-p", "sinks", "--texts", texts, "--table", "sinks.layers", "--format")
    rows = list(csv.reader(io.StringIO(phaselens(*arguments, "csv").out)))
    assert rows[0] == [
        "model",
        "layer",
        "sink_rate",
        "ci_low",
        "ci_high",
        "null_rate",
        "mean_score",
        "learned_sink",
    ]
    assert [row[:2] for row in rows[1:]] == [["tiny", "0"], ["tiny", "1"]]
    markdown = phaselens(*arguments, "markdown").out.splitlines()
    assert len(markdown) == 2 + 2
    assert f"{float(rows[1][2]):.4f}" in markdown[2]


@pytest.mark.slow
def test_notes_go_to_stderr_where_stdout_is_a_table_of_data(
    phaselens: Phaselens, checkpoint: Path, texts: Path
) -> None:
    arguments = ("run", checkpoint, "-p", "sinks", "--texts", texts, "--max-tokens", 8, "--format", "csv")
    assert phaselens(*arguments).err == "phaselens: note: tiny: 2 of 4 texts were cut to 8 tokens\n"
    assert phaselens(*arguments, "--quiet").err == ""


@pytest.mark.slow
def test_a_text_of_one_token_is_missing_with_a_note_and_no_error(
    phaselens: Phaselens, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("a\nb\n")
    outcome = phaselens("run", checkpoint, "-p", "sinks", "--texts", tmp_path / "one.txt", "--bos", "never")
    assert (outcome.code, outcome.err) == (0, "")
    assert "score is missing: fewer than two tokens in text 'one:1', 'one:2'" in " ".join(outcome.out.split())


@pytest.mark.slow
@pytest.mark.usefixtures("broken")
def test_a_failed_metric_exits_with_code_1_and_the_others_are_written(
    phaselens: Phaselens, checkpoint: Path, texts: Path
) -> None:
    outcome = phaselens("run", checkpoint, "-p", "broken,sinks", "--texts", texts, "--format", "json")
    assert outcome.code == 1
    assert outcome.err.startswith(
        "phaselens: error: metric broken failed: ZeroDivisionError in compute on tiny: its own fault"
    )
    assert outcome.err.count("\n") == 1
    metrics = json.loads(outcome.out)["metrics"]
    assert (metrics["broken"]["status"], metrics["sinks"]["status"]) == ("failed", "ok")
    assert metrics["broken"]["tables"] == {}
    assert metrics["broken"]["errors"][0]["type"] == "ZeroDivisionError"
    assert len(metrics["sinks"]["tables"]["layers"]["rows"]) == 2
    only = phaselens(
        "run", checkpoint, "-p", "broken", "--texts", texts, "--format", "csv", "--table", "texts"
    )
    assert (only.code, only.out) == (1, "")


def test_what_a_metric_prints_does_not_reach_stdout(
    phaselens: Phaselens, checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = probe(name="loud", setup=lambda self: print("I was here"))
    find = Plugins.metric
    monkeypatch.setattr(Plugins, "metric", lambda self, name: loud if name == "loud" else find(self, name))
    monkeypatch.setattr(Plugins, "origin", lambda self, name: self.registered[0])
    outcome = phaselens("run", checkpoint, "-p", "loud", "--texts", texts, "--format", "json")
    json.loads(outcome.out)
    assert outcome.err == "I was here\n"


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(name):
            path.unlink()

    return change


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("*"), "holds no config.json"),
        (without("*.safetensors"), "has a config.json, but no *.safetensors"),
        (without("tokenizer*"), "has no tokenizer for the texts"),
        (cut_weights, "it is truncated or damaged"),
        (spoil_config, "could not be loaded"),
    ],
)
def test_a_damaged_checkpoint_exits_with_code_3(
    error_line: ErrorLine,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    change(folder)
    assert message in error_line(3, "run", folder, "-p", "sinks", "--texts", texts)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dtype", "fp17"], 2, "dtype 'fp17' is not known; did you mean fp16?"),
        (["--device", "gpu"], 2, "torch has no device 'gpu'; use auto, cpu, cuda or cuda:N"),
        (["./not-there"], 3, "model './not-there': no such folder"),
        (
            ["nothere"],
            3,
            "model 'nothere': neither one of rope, drope, smollm2, smollm2-drope, smollm2-rope, nor a folder, nor",
        ),
    ],
)
def test_unknown_models_dtypes_and_devices_are_refused(
    error_line: ErrorLine, checkpoint: Path, texts: Path, arguments: list[str], code: int, message: str
) -> None:
    assert error_line(code, "run", checkpoint, *arguments, "-p", "sinks", "--texts", texts).startswith(
        message
    )


@pytest.mark.slow
def test_too_little_memory_is_an_error_of_one_line(
    error_line: ErrorLine, checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from phaselens.lens.bridge import HookedTransformer

    def too_large(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(HookedTransformer, "stream", too_large)
    monkeypatch.setattr("phaselens.lens.checks.require", lambda *args: None)
    monkeypatch.setattr("phaselens.lens.checks.run_checks", lambda *args, **kwargs: [])
    message = error_line(2, "run", checkpoint, "-p", "sinks", "--texts", texts)
    assert "lower --batch-tokens or --max-tokens" in message


@pytest.mark.slow
def test_texts_come_from_the_named_fields_or_from_stdin(
    phaselens: Phaselens, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "abc de", "kind": "prose"}\n{"body": null, "kind": "x"}\n')
    arguments = ["run", checkpoint, "-p", "sinks", "--format", "json", "--texts"]
    fields = ["--text-field", "body", "--label-field", "kind"]
    result = phaselens(*arguments, tmp_path / "a.jsonl", *fields)
    assert [text["id"] for text in json.loads(result.out)["texts"]] == ["a:1"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\ncd\n\nabc de f\n")))
    result = phaselens(*arguments, "-", "--paragraphs")
    assert [text["id"] for text in json.loads(result.out)["texts"]] == ["stdin:1", "stdin:4"]


@pytest.mark.slow
def test_scale_and_rope_type_are_set_by_label_and_recorded(
    phaselens: Phaselens, checkpoint: Path, texts: Path
) -> None:
    arguments = (
        "run",
        f"a={checkpoint}",
        f"b={checkpoint}",
        "-p",
        "sinks",
        "--texts",
        texts,
        "--format",
        "json",
    )
    result = phaselens(*arguments, "--softmax-scale", "a=0.5", "--rope-scaling", "b=linear:2")
    assert result.code == 0, result.err
    run = json.loads(result.out)
    assert [(model["softmax_scale"], model["rope_scaling"]) for model in run["models"]] == [
        (0.5, None),
        (None, "linear:2"),
    ]
    assert run["options"]["softmax_scale"] == {"a": 0.5}
    assert run["options"]["rope_scaling"] == {"b": "linear:2"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--softmax-scale", "a", "--softmax-scale 'a': write LABEL=NUMBER"),
        ("--softmax-scale", "tiny=x", "--softmax-scale tiny=x: write LABEL=NUMBER"),
        ("--softmax-scale", "tiny=0", "softmax_scale is 0.0; give the factor of q·k"),
        ("--softmax-scale", "other=1", "softmax_scale: no model is labelled 'other'"),
        ("--rope-scaling", "tiny=yarn", "rope_scaling is 'yarn'; write linear:FACTOR"),
        ("--rope-scaling", "yarn:4", "--rope-scaling 'yarn:4': write LABEL=yarn:4"),
    ],
)
def test_a_wrong_scale_or_rope_type_is_one_line(
    error_line: ErrorLine, checkpoint: Path, texts: Path, option: str, value: str, message: str
) -> None:
    assert error_line(2, "run", checkpoint, "-p", "sinks", "--texts", texts, option, value).startswith(
        message
    )
