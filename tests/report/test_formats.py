"""JSON, CSV and Markdown have the same numbers, and no label breaks them."""

import csv
import io
import json
from dataclasses import replace

import pytest

from phaselens.errors import InputError
from phaselens.report.formats import (
    DEFAULT_FORMAT,
    FORMATS,
    formats_with_tracebacks,
    run_formats,
    table_formats,
)
from phaselens.report.table_names import find_table
from tests.report.runs import made_run, written, written_table


def test_json_is_one_strict_object() -> None:
    run = made_run()
    text = written(run, "json")
    assert text.count("\n") == 1
    assert text.isascii()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == run.to_dict()


def test_csv_is_one_table_with_empty_fields_for_missing_values() -> None:
    rows = list(csv.DictReader(io.StringIO(written_table(made_run(), "csv"))))
    assert len(rows) == 6
    assert rows[1] == {
        "model": "rope",
        "layer": "1",
        "sink_rate": "0.625",
        "ci_low": "0.5",
        "ci_high": "0.75",
        "null_rate": "0.02",
        "mean_score": "0.25",
        "learned_sink": "0.0",
    }
    assert rows[2]["sink_rate"] == ""


@pytest.mark.parametrize(
    ("label", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@a", "'@a"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a=b", "a=b"),
    ],
)
def test_csv_holds_no_formula_and_no_escape_sequence(label: str, cell: str) -> None:
    rows = list(csv.DictReader(io.StringIO(written_table(made_run(label), "csv", "sinks.summary"))))
    assert [row["model"] for row in rows] == [cell]


def test_csv_quotes_commas_quotes_and_line_ends() -> None:
    (row, *_) = csv.reader(
        io.StringIO(written_table(made_run('a,"b"\nc'), "csv", "sinks.summary").partition("\n")[2])
    )
    assert row[0] == 'a,"b"\nc'


def test_a_table_is_found_by_name_or_by_metric_and_name() -> None:
    declared = {"sinks": ["texts", "layers"], "other": ["layers", "more"]}
    assert find_table(declared, "texts") == ("sinks", "texts")
    assert find_table(declared, "other.layers") == ("other", "layers")
    with pytest.raises(
        InputError, match=r"sinks, other each have a table 'layers'; write --table sinks\.layers"
    ):
        find_table(declared, "layers")
    with pytest.raises(InputError, match=r"no table 'text'; did you mean texts\?"):
        find_table(declared, "text")
    with pytest.raises(InputError, match=r"no table 'sinks\.more'"):
        find_table(declared, "sinks.more")
    with pytest.raises(
        InputError, match=r"--table sink\.texts: 'sink' is not in this run; did you mean sinks\?"
    ):
        find_table(declared, "sink.texts")


def test_markdown_tables_stay_whole_with_any_label() -> None:
    lines = written(made_run("a|b", "<b>*x*</b>"), "markdown").splitlines()
    assert lines[0] == "### sinks: attention sinks"
    grid = [line for line in lines if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in grid}
    assert widths == {8}  # layer and 2 × 3 columns; a model and 6 of its facts
    assert any("a\\|b sink rate" in line for line in grid)
    assert any("&lt;b>\\*x\\*&lt;/b> null" in line for line in grid)
    assert sum("● 62.5 %" in line for line in grid) == 1
    assert "- drope: a warning" in lines


def test_markdown_names_the_bos_policy_above_its_warnings() -> None:
    run = made_run("rope", "a*b")
    assert written(run, "markdown").splitlines()[-3:] == [
        "bos: auto (position 0 as the model's tokenizer makes it)",
        "",
        "- drope: a warning",
    ]
    run.models[0] = replace(run.models[0], bos="never")
    assert written(run, "markdown").splitlines()[-3] == "bos: rope never, a\\*b auto"


def test_markdown_of_one_table() -> None:
    lines = written_table(made_run(), "markdown", "layers").splitlines()
    names = ["model", "layer", "sink_rate", "ci_low", "ci_high", "null_rate", "mean_score", "learned_sink"]
    assert lines[0] == f"| {' | '.join(names)} |".replace("_", "\\_")
    assert len(lines) == 2 + 6


def test_markdown_names_a_failed_metric() -> None:
    assert "failed: ValueError in update on rope: no \\[bold\\]way\\[/\\]" in written(
        made_run(failed=True), "markdown"
    )


def test_json_of_one_table() -> None:
    run = made_run()
    values = json.loads(written_table(run, "json", "layers"))
    assert values == {"table": "sinks.layers", **run.rows("sinks", "layers").as_dict()}


def test_formats_say_what_they_can_represent() -> None:
    assert DEFAULT_FORMAT == "table"
    assert run_formats() == ["table", "json", "markdown", "latex"]
    assert table_formats() == list(FORMATS)


def test_the_formats_with_tracebacks_are_those_that_write_them() -> None:
    run = made_run(failed=True)
    traceback = run.metrics["sinks"].failures[0].traceback
    assert [name for name in run_formats() if traceback in written(run, name)] == formats_with_tracebacks()


def test_parquet_is_refused_where_only_text_can_be_written() -> None:
    with pytest.raises(InputError, match="parquet is binary, but the file takes text only"):
        written_table(made_run(), "parquet")
