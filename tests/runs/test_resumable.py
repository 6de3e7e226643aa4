"""A run in a directory: the same tables as without one, continued after any interruption, refused where changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

import phaselens
from phaselens import api
from phaselens.data import Text
from phaselens.errors import InputError, PhaseLensError
from phaselens.runs import Observer, Run
from phaselens.runs import run as measure
from phaselens.testing import tiny_lens
from tests.marks import mark_later_slow
from tests.runs.conditions import causal, zero
from tests.runs.metrics import Probe, probe
from tests.runs.test_layer_points import lens_of
from tests.toys import letters, save_checkpoint, toy_lens

TEXTS = [letters(length, length) for length in (3, 17, 1, 8, 8, 30, 5, 12)]
OPTIONS: dict[str, Any] = {
    "metrics": {"sinks": {}, "bos-mlp": {}, "qk-disruption": {"multiple": 1.2, "seeds": 1}},
    "texts": TEXTS,
    "shard_tokens": 20,
}


class InterruptingAfter(Observer):
    """Raises an exception after some batches."""

    def __init__(self, n_batches: int, error: BaseException) -> None:
        self.n_batches = n_batches
        self.error = error
        self.n_advanced = 0

    def advance(self, n_tokens: int) -> None:
        self.n_advanced += 1
        if self.n_advanced > self.n_batches:
            raise self.error


class Listening(Observer):
    """Records what was loaded and how many tokens were read."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.n_tokens = 0

    def loading(self, label: str) -> None:
        self.loaded.append(label)

    def advance(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


@pytest.fixture(scope="module")
def expected(lens: Any) -> Run:
    """The run without a directory."""
    return measure(lens, **OPTIONS)


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file under a folder, without partial ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.endswith(".partial")
    }


def require_equal(run: Run, expected: Run) -> None:
    """Compare everything that a run prints, to the bit."""
    assert run.to_dict() == expected.to_dict()
    assert api.tables_text(run) == api.tables_text(expected)


@pytest.mark.slow
def test_the_run_in_a_directory_equals_the_one_without(lens: Any, expected: Run, tmp_path: Path) -> None:
    require_equal(measure(lens, out=tmp_path / "r", **OPTIONS), expected)
    opened = phaselens.open_run(tmp_path / "r")
    require_equal(opened, expected)
    assert opened.table("sinks", "layers") == expected.table("sinks", "layers")
    assert opened.directory == tmp_path / "r"
    with pytest.raises(InputError, match="metric 'sinks' has no table 'layer'"):
        opened.table("sinks", "layer")


@pytest.mark.slow
def test_the_directory_has_the_record_the_tables_and_the_figures(
    lens: Any, expected: Run, tmp_path: Path
) -> None:
    phaselens.run(lens, out=tmp_path, command=["phaselens", "run"], **OPTIONS)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "result.json", "tables", "shards", "times", "figures"}
    assert (tmp_path / "figures" / "sinks.png").is_file()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == ["phaselens", "run"]
    (model,) = record["models"]
    assert model["positions"] == ["rope", "rope"]
    assert model["dtype"] == "float32"
    assert model["attention_path"].startswith("sdpa")
    assert len(model["hashes"]["weights"]) == 64
    assert [text["sha256"] for text in record["texts"]] == [Text("", text).sha256 for text in TEXTS]
    assert record["metrics"]["qk-disruption"]["params"]["multiple"] == 1.2
    assert record["seeds"] == {"seed": 0}
    assert {"python", "torch", "transformers", "transformer-lens", "phaselens", "plugins"} <= set(
        record["versions"]
    )
    for name, result in expected.metrics.items():
        for table_name, table in result.tables.items():
            arrow = parquet.read_table(tmp_path / "tables" / f"{name}.{table_name}.parquet")
            assert arrow.to_pylist() == table.to_arrow().to_pylist()
            assert arrow.schema.metadata[b"phaselens.schema"] == b"phaselens.table/1"
            units = {field.name: (field.metadata or {}).get(b"unit") for field in arrow.schema}
            assert units == {
                column.name: column.unit and column.unit.encode() for column in table.spec.columns
            }


@pytest.mark.slow
@pytest.mark.parametrize("n_batches", mark_later_slow([9, 0, 1, 5, 20, 60]))
@pytest.mark.parametrize("error", mark_later_slow([KeyboardInterrupt(), PhaseLensError("stopped")]))
def test_an_interrupted_run_continues_to_the_same_tables(
    lens: Any, expected: Run, tmp_path: Path, n_batches: int, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        measure(lens, out=tmp_path, observer=InterruptingAfter(n_batches, error), **OPTIONS)
    before = contents(tmp_path)
    assert "run.json" in before
    assert "result.json" not in before
    with pytest.raises(InputError, match="is not complete; run its command again"):
        phaselens.open_run(tmp_path)
    total, remaining = Listening(), Listening()
    measure(lens, observer=total, **OPTIONS)
    require_equal(measure(lens, out=tmp_path, observer=remaining, **OPTIONS), expected)
    assert contents(tmp_path).items() >= before.items()  # nothing that existed has changed
    if n_batches > 1:
        assert remaining.n_tokens < total.n_tokens


@pytest.mark.slow
def test_a_complete_run_is_read_and_nothing_is_measured_or_written(tmp_path: Path) -> None:
    source = str(save_checkpoint(tmp_path / "model"))
    options = {**OPTIONS, "out": tmp_path / "r"}
    first = measure(source, **options)
    before = contents(tmp_path)
    listening = Listening()
    require_equal(measure(source, observer=listening, **options), first)
    assert (listening.loaded, listening.n_tokens) == ([], 0)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_shards_that_exist_are_merged_without_loading_the_model(tmp_path: Path) -> None:
    source = str(save_checkpoint(tmp_path / "model"))
    options = {**OPTIONS, "out": tmp_path / "r"}
    first = measure(source, **options)
    tables = contents(tmp_path / "r" / "tables")
    (tmp_path / "r" / "result.json").unlink()
    for table in (tmp_path / "r" / "tables").iterdir():
        table.unlink()
    listening = Listening()
    require_equal(measure(source, observer=listening, **options), first)
    assert (listening.loaded, listening.n_tokens) == ([], 0)
    assert contents(tmp_path / "r" / "tables") == tables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "metrics"),
    [
        ("llama", {"over-mixing": {}, "sinks": {}}),
        ("mamba", {"sinks": {}, "bos-norm": {}}),
        ("bamba", {"sinks": {}, "bos-mlp": {}}),
        ("llama", {"passkey": {"lengths": "150, 200", "n": 1, "symbols": "ab", "conditions": "bos-mlp"}}),
    ],
)
def test_metrics_with_texts_of_their_own_and_without_values_continue_too(
    tmp_path: Path, family: str, metrics: dict[str, Any]
) -> None:
    lens = lens_of(family) if family in ("bamba", "mamba") else tiny_lens(family)
    options = {
        **OPTIONS,
        "texts": ["to be or not to be", "that is the question: whether"] * 2,
        "metrics": metrics,
    }
    options["texts"] = [f"{text} {number}" for number, text in enumerate(options["texts"])]
    expected = measure(lens, **options)
    assert not expected.failed
    with pytest.raises(KeyboardInterrupt):
        measure(lens, out=tmp_path, observer=InterruptingAfter(3, KeyboardInterrupt()), **options)
    for _ in range(2):
        require_equal(measure(lens, out=tmp_path, **options), expected)
        (tmp_path / "result.json").unlink()


@pytest.mark.slow
def test_damaged_shards_are_computed_again(lens: Any, expected: Run, tmp_path: Path) -> None:
    measure(lens, out=tmp_path, **OPTIONS)
    before = contents(tmp_path)
    (tmp_path / "result.json").unlink()
    files = sorted((tmp_path / "shards").iterdir())
    for file, cut in ((files[0], 0), (files[3], 100), (files[-1], -1)):
        file.write_bytes(file.read_bytes()[:cut])
    run = measure(lens, out=tmp_path, **OPTIONS)
    notes = [warning for warning in run.warnings if "was damaged" in warning]
    assert sorted(notes) == [
        f"shards/{file.name} was damaged, and was computed again" for file in (files[0], files[3], files[-1])
    ]
    run.warnings = [warning for warning in run.warnings if warning not in notes]
    require_equal(run, expected)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"result.json"}


class Versioned(Probe):
    """A metric whose version a test changes."""

    name = "versioned"


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"texts": [*TEXTS[:-1], "a b"]}, r"1 texts have changed \(first: '7'\)"),
    ({"texts": TEXTS[:-1]}, "number of texts: 8, now 7"),
    ({"n_texts": 3}, "number of texts: 8, now 3"),
    ({"shard_tokens": 21}, "--shard-tokens: 20, now 21"),
    ({"batch_tokens": 64}, "--batch-tokens: 8192, now 64"),
    ({"max_tokens": 9}, "--max-tokens: 512, now 9"),
    ({"seed": 1}, "--seed: 0, now 1"),
    ({"bos": "never"}, "--bos: None, now never"),
    ({"metrics": {"sinks": {"threshold": 0.5}}}, "sinks.threshold: 0.3, now 0.5"),
    ({"metrics": ["sinks", "bos-norm"]}, "metrics: sinks, now sinks, bos-norm"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"), CHANGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_run_of_something_else_is_refused_by_what_has_changed(
    lens: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = {**OPTIONS, "metrics": "sinks"}
    measure(lens, out=tmp_path / "r", **options)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"was made with something else: {message}; give the command"):
        measure(lens, out=tmp_path / "r", **{**options, **change})
    assert contents(tmp_path) == before
    fresh = measure(lens, out=tmp_path / "r", fresh=True, **{**options, **change})
    assert fresh.directory == tmp_path / "r-2"
    assert contents(tmp_path).items() >= before.items()


@pytest.mark.slow
def test_a_changed_model_is_refused_by_the_file(lens: Any, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model")
    options = {**OPTIONS, "metrics": "sinks", "out": tmp_path / "r"}
    measure(str(source), **options)
    save_checkpoint(source, seed=1)
    with pytest.raises(InputError, match=r"file model\.safetensors of model model has changed"):
        measure(str(source), **options)
    with pytest.raises(InputError, match="models: model, now llama"):
        measure(lens, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_changed_gguf_file_or_adapter_is_refused_by_the_file(tmp_path: Path) -> None:
    from tests.lens.gguf_models import same_model, write_gguf
    from tests.lens.saved_adapters import save_adapter

    file, adapter = tmp_path / "tiny.gguf", tmp_path / "lora"
    weights = write_gguf(file)
    save_adapter(same_model(weights), adapter, target_modules=["q_proj"])
    options = {**OPTIONS, "metrics": "sinks"}
    alone, adapted = {**options, "out": tmp_path / "alone"}, {**options, "out": tmp_path / "adapted"}
    name = f"both={file}+{adapter}"
    first = measure(name, **adapted)
    measure(str(file), **alone)
    require_equal(measure(name, **adapted), first)
    save_adapter(same_model(weights), adapter, seed=1, target_modules=["q_proj"])
    with pytest.raises(
        InputError, match=r"file adapter/adapter_model\.safetensors of model both has changed"
    ):
        measure(name, **adapted)
    write_gguf(file, fields={"general.name": "another"})
    with pytest.raises(InputError, match=r"file tiny\.gguf of model tiny\.gguf has changed"):
        measure(str(file), **alone)


@pytest.mark.slow
def test_changed_weights_of_a_loaded_model_are_refused(tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": "sinks", "out": tmp_path / "r"}
    measure(toy_lens(), **options)
    with pytest.raises(InputError, match="weights of model llama: "):
        measure(toy_lens(seed=1), **options)
    nulled = toy_lens()
    nulled.set_rotation(nulled=True)
    with pytest.raises(InputError, match="positions of model llama: "):
        measure(nulled, **options)


def test_a_changed_plugin_is_refused_by_its_version(
    lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "metrics": Versioned, "out": tmp_path / "r"}
    measure(lens, **options)
    monkeypatch.setattr(Versioned, "version", "2")
    with pytest.raises(InputError, match="version of metric versioned: 1, now 2"):
        measure(lens, **options)


@pytest.mark.slow
def test_a_file_that_a_metric_reads_is_part_of_the_record(lens: Any, tmp_path: Path) -> None:
    from tests.plugins.test_knowledge import LETTERS, write

    file = write(tmp_path, LETTERS)
    options = {**OPTIONS, "metrics": {"knowledge": {"file": file}}, "out": tmp_path / "r"}
    measure(lens, **options)
    write(tmp_path, LETTERS[1:])
    with pytest.raises(InputError, match="metric knowledge: a file that it reads has changed"):
        measure(lens, **options)


def test_failures_are_kept_and_their_tracebacks_written(lens: Any, tmp_path: Path) -> None:
    def fails(self: Any, layer: Any) -> None:
        raise ZeroDivisionError("its own fault")

    options = {**OPTIONS, "metrics": ["sinks", probe(name="failing", update=fails)], "out": tmp_path}
    for _ in range(2):
        run = measure(lens, **options)
        assert run.failed == ["failing"]
        assert run.metrics["failing"].failures[0].stage == "update"
        assert run.metrics["failing"].tables == {}
        assert run.table("sinks", "layers").num_rows == 2
    text = (tmp_path / "errors" / "failing.llama.txt").read_text()
    assert "ZeroDivisionError: its own fault" in text


def test_conditions_that_are_drawn_anew_are_refused(lens: Any, tmp_path: Path) -> None:
    draws = random.Random()

    def conditions(self: Any) -> Any:
        return [zero("blocks.0.hook_mlp_out", 0, name=f"off {draws.random()}")]

    options = {**OPTIONS, "metrics": causal(conditions=conditions), "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        measure(lens, observer=InterruptingAfter(3, KeyboardInterrupt()), **options)
    with pytest.raises(InputError, match="metric 'causal' chose other conditions or sequences than in"):
        measure(lens, **options)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_continues(
    lens: Any, expected: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    for n_files in (0, 9):
        left = [n_files]

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            PhaseLensError, match="cannot be written: No space left on device; finished shards"
        ):
            measure(lens, out=tmp_path / "r", **OPTIONS)
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]
    monkeypatch.setattr(os, "fsync", fsync)
    require_equal(measure(lens, out=tmp_path / "r", **OPTIONS), expected)


@pytest.mark.slow
def test_a_small_file_system_that_is_full(lens: Any, expected: Run, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        with pytest.raises(PhaseLensError, match="No space left on device"):
            measure(lens, out=folder / "r", **OPTIONS)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        require_equal(measure(lens, out=folder / "r", **OPTIONS), expected)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


KILLS = """
import os, random, signal, sys, time
import phaselens
from tests.runs.test_resumable import OPTIONS, contents, require_equal
from tests.toys import toy_lens
from pathlib import Path

lens, folder = toy_lens(), Path(sys.argv[1])
start = time.monotonic()
expected = phaselens.runs.run(lens, out=folder / "whole", **OPTIONS)
seconds = time.monotonic() - start
draw, n_kills, number = random.Random(0), 0, 0
while n_kills < 20:
    out = folder / str(number)
    before = contents(out) if out.exists() else {}
    child = os.fork()
    if not child:
        phaselens.runs.run(lens, out=out, **OPTIONS)
        os._exit(0)
    time.sleep(draw.uniform(0.0, seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    after = contents(out) if out.exists() else {}
    assert after.items() >= before.items(), (before, after)
    n_kills += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status) or n_kills % 4 == 0:
        assert phaselens.runs.run(lens, out=out, **OPTIONS).to_dict() == expected.to_dict()
        tables = lambda path: contents(path / "tables")
        assert tables(out) == tables(folder / "whole")
        assert not [name for name in contents(out / "shards") if name not in contents(folder / "whole" / "shards")]
        number += 1
print(n_kills, "kills in", number, "runs")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_at_twenty_moments_gives_the_same_tables(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("20 kills in ")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda path: path.write_text("x"), {}, "is a file; name a directory"),
        (lambda path: (path / "shards").mkdir(parents=True), {}, r"holds shards, but no run\.json"),
        (lambda path: path.mkdir(), {"out": 3}, "out is the int 3; give the name of a directory"),
        (lambda path: path.mkdir(), {"out": None, "fresh": True}, "name one with out"),
        (lambda path: path.mkdir(), {"fresh": 1}, "expected fresh as True or False"),
        (lambda path: path.mkdir(), {"command": "phaselens"}, "command is the str 'phaselens'"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused(
    lens: Any, tmp_path: Path, prepare: Any, options: dict[str, Any], message: str
) -> None:
    prepare(tmp_path / "r")
    with pytest.raises(InputError, match=message):
        measure(lens, **{**OPTIONS, "out": tmp_path / "r", **options})


def test_files_of_others_in_the_directory_stay(lens: Any, tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").write_text("mine")
    measure(lens, out=tmp_path, **{**OPTIONS, "metrics": "sinks"})
    assert (tmp_path / "slurm-1.out").read_text() == "mine"


def test_what_is_no_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run\.json; name the directory of a run"):
        phaselens.open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": "other/1"}')
    with pytest.raises(InputError, match="has the schema 'other/1'"):
        phaselens.open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        phaselens.open_run(tmp_path)
