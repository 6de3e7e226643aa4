"""`phaselens show`, `export` and `runs`: what they print of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from phaselens.cli.entry import run_to_exit_code
from tests.cli.conftest import ErrorLine, Phaselens
from tests.toys import letters, save_checkpoint


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    save_checkpoint(folder / "tiny")
    (folder / "texts.txt").write_text("\n".join(letters(length, length) for length in (5, 12, 2, 9)))
    words = ["run", folder / "tiny", "-p", "sinks,bos-norm", "--texts", folder / "texts.txt", "--quiet"]
    assert run_to_exit_code([*map(str, words), "--out", str(folder / "study")]) == 0
    return folder / "study"


@pytest.mark.slow
def test_show_prints_what_the_run_printed(phaselens: Phaselens, study: Path) -> None:
    command = json.loads((study / "run.json").read_text())["command"][1:]
    again = phaselens(*command)
    shown = phaselens("show", study)
    assert (shown.code, shown.out, shown.err) == (0, again.out, "")
    table = phaselens("show", study, "--table", "sinks.heads")
    assert table.out.split()[0] == "sinks.heads"


def test_what_is_not_a_complete_run_is_refused(error_line: ErrorLine, study: Path, tmp_path: Path) -> None:
    assert "holds no run.json" in error_line(2, "show", tmp_path)
    (tmp_path / "run.json").write_bytes((study / "run.json").read_bytes())
    assert "is not complete; run its command again to continue: phaselens run" in error_line(
        2, "show", tmp_path
    )
    assert "no table 'layer'; did you mean layers?" in error_line(2, "show", study, "--table", "layer")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["csv", "json", "markdown", "latex"])
def test_export_writes_what_the_run_prints_in_that_format(
    phaselens: Phaselens, study: Path, name: str, tmp_path: Path
) -> None:
    command = json.loads((study / "run.json").read_text())["command"][1:]
    for table in ([], ["--table", "bos-norm.layers"]):
        if name == "csv" and not table:
            continue
        printed = phaselens(*command, "--format", name, *table).out
        exported = phaselens("export", study, "--format", name, *table)
        assert (exported.code, exported.out, exported.err) == (0, printed, "")
        to_file = phaselens("export", study, "--format", name, *table, "--out", tmp_path / "new" / "file")
        assert (to_file.code, to_file.out) == (0, "")
        assert (tmp_path / "new" / "file").read_text() == printed


def test_csv_without_a_table_says_which_it_is(
    phaselens: Phaselens, error_line: ErrorLine, study: Path
) -> None:
    message = error_line(2, "export", study, "--format", "csv")
    assert message == "sinks, bos-norm each have a table 'layers'; write --table sinks.layers"


def test_every_table_goes_to_a_folder(phaselens: Phaselens, study: Path, tmp_path: Path) -> None:
    for name in ("parquet", "csv"):
        result = phaselens("export", study, "--format", name, "--out", tmp_path / name)
        assert result.code == 0
        assert {path.stem for path in (tmp_path / name).iterdir()} == {
            path.stem for path in (study / "tables").iterdir()
        }
    table = parquet.read_table(tmp_path / "parquet" / "sinks.layers.parquet")
    assert table.equals(parquet.read_table(study / "tables" / "sinks.layers.parquet"))
    assert (tmp_path / "csv" / "sinks.layers.csv").read_text().startswith("model,layer,sink_rate,")


def test_a_file_that_cannot_be_written_is_named(error_line: ErrorLine, study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = error_line(2, "export", study, "--format", "json", "--out", tmp_path / "file" / "x")
    assert message.startswith(f"--out '{tmp_path / 'file' / 'x'}' cannot be written: ")
    assert "Missing option '--format'" in error_line(2, "export", study)


def test_runs_are_listed_by_their_date(phaselens: Phaselens, study: Path, tmp_path: Path) -> None:
    record = json.loads((study / "run.json").read_text())
    record["times"]["started"] = "2020-02-03T04:05:06+00:00"
    for name in ("older", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "older" / "run.json").write_text(json.dumps(record))
    lines = phaselens("runs", study, tmp_path / "older").out.splitlines()
    assert lines[0].split() == ["run", "began", "(UTC)", "state", "models", "texts", "metrics"]
    assert "2020-02-03 04:05  0 of 1 shards  tiny    4 (" in lines[1]
    complete = next(line for line in lines[2:] if line.startswith(str(study)))
    assert "complete" in complete
    (tmp_path / "broken" / "run.json").write_text("{")
    result = phaselens("runs", "--json", tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"phaselens: error: '{tmp_path / 'broken' / 'run.json'}' cannot be read")
    assert [run["state"] for run in json.loads(result.out)] == ["0 of 1 shards"]


def test_a_metric_that_failed_is_reported_again(phaselens: Phaselens, study: Path, tmp_path: Path) -> None:
    result = json.loads((study / "result.json").read_text())
    failure = {"model": "tiny", "stage": "update", "type": "ValueError", "message": "no number"}
    result["failures"] = {"sinks": [failure | {"traceback": "the traceback", "where": None}]}
    copy = tmp_path / "failed"
    (copy / "tables").mkdir(parents=True)
    for path in study.glob("tables/*"):
        (copy / "tables" / path.name).write_bytes(path.read_bytes())
    (copy / "run.json").write_bytes((study / "run.json").read_bytes())
    (copy / "result.json").write_text(json.dumps(result))
    shown = phaselens("show", copy, "--debug")
    assert shown.code == 1
    assert "the traceback" in shown.err
    assert "error: metric sinks failed: ValueError in update on tiny: no number" in shown.err
    assert "failed: sinks" in phaselens("runs", copy).out
