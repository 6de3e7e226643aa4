"""A new `--format` needs only a class in the registry of formats."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import IO, ClassVar

import click
import pyarrow.parquet as parquet
import pytest

from phaselens.cli.entry import run_to_exit_code
from phaselens.cli.output import format_option
from phaselens.cli.run_command import run as run_command
from phaselens.plugin import Table
from phaselens.report.formats import FORMATS, RunFormat, TableFormat
from phaselens.runs import Run
from tests.cli.conftest import ErrorLine, Phaselens


class RowCounts(RunFormat, TableFormat):
    """A format that represents a run, or one of its tables, as numbers of rows."""

    help: ClassVar[str] = "numbers of rows"

    def write_run(self, run: Run, file: IO[str]) -> None:
        for name, result in run.metrics.items():
            for table_name, table in result.tables.items():
                self.write_table(f"{name}.{table_name}", table, file)

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        print(name, len(table.rows), file=file)


class ModelNames(RunFormat):
    """A format that represents a whole run only."""

    help: ClassVar[str] = "labels of the models"

    def write_run(self, run: Run, file: IO[str]) -> None:
        print(*(model.info.label for model in run.models), file=file)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the two formats, and rebuild `--format` from the registry, as on import of the command."""
    monkeypatch.setitem(FORMATS, "row-counts", RowCounts)
    monkeypatch.setitem(FORMATS, "model-names", ModelNames)

    @format_option
    @click.command
    def command() -> None:
        """A command with the option."""

    (option,) = command.params
    parameters = [option if parameter.name == option.name else parameter for parameter in run_command.params]
    monkeypatch.setattr(run_command, "params", parameters)


@pytest.mark.slow
def test_a_registered_format_writes_the_run_or_one_table(
    phaselens: Phaselens, checkpoint: Path, texts: Path
) -> None:
    arguments = ("run", checkpoint, "-p", "bos-norm", "--texts", texts, "--format", "row-counts")
    whole_run = phaselens(*arguments)
    assert (whole_run.code, whole_run.err) == (0, "")
    assert "bos-norm.layers 2" in whole_run.out.splitlines()
    table = phaselens(*arguments, "--table", "layers")
    assert (table.code, table.out) == (0, "bos-norm.layers 2\n")


@pytest.mark.slow
def test_a_format_without_tables_refuses_the_option_before_it_measures(
    phaselens: Phaselens, checkpoint: Path, texts: Path
) -> None:
    arguments = ("run", checkpoint, "-p", "bos-norm", "--texts", texts, "--format", "model-names")
    assert phaselens(*arguments).out == "tiny\n"
    refused = phaselens(*arguments, "--table", "layers")
    assert refused.code == 2
    assert (
        "leave --table out, or choose csv, json, latex, markdown, parquet, row-counts or table" in refused.err
    )


def test_help_and_the_list_of_choices_come_from_the_registry(phaselens: Phaselens) -> None:
    text = " ".join(phaselens("run", "--help").out.split())
    assert "row-counts: numbers of rows; model-names: labels of the models." in text
    assert "[table|json|csv|markdown|parquet|latex|row-counts|model-names]" in text


@pytest.mark.slow
def test_parquet_has_the_rows_types_and_units_of_the_table(
    capsysbinary: pytest.CaptureFixture[bytes], checkpoint: Path, texts: Path
) -> None:
    arguments = ["run", str(checkpoint), "-p", "sinks", "--texts", str(texts), "--table", "heads"]
    assert run_to_exit_code([*arguments, "--format", "parquet"]) == 0
    table = parquet.read_table(io.BytesIO(capsysbinary.readouterr().out))
    assert run_to_exit_code([*arguments, "--format", "csv"]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[0].split(",") == table.column_names
    assert len(lines) == 1 + table.num_rows
    assert [str(table.schema.field(name).type) for name in ("model", "layer", "score")] == [
        "string",
        "int64",
        "double",
    ]
    assert table.schema.field("score").metadata[b"unit"] == b"share of attention"


def test_parquet_is_refused_on_a_terminal(
    error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, texts: Path
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    message = error_line(2, "run", checkpoint, "-p", "sinks", "--texts", texts, "--format", "parquet")
    assert message == "--format parquet is binary; redirect it to a file: … > FILE.parquet"


@pytest.mark.slow
def test_a_heatmap_is_drawn_below_the_tables(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, texts: Path
) -> None:
    arguments = ("run", checkpoint, "-p", "sinks,bos-norm", "--texts", texts)
    result = phaselens(*arguments, "--heatmap", "sinks", "--heatmap", "sinks.null")
    assert result.code == 0
    assert result.out.index("sinks: score of tiny") > result.out.index("bos: ")
    assert "sinks: null of tiny" in result.out
    assert "has no value for each layer and head" in error_line(2, *arguments, "--heatmap", "bos-norm")
    assert "leave --format and --table out" in error_line(
        2, *arguments, "--heatmap", "sinks", "--format", "json"
    )
