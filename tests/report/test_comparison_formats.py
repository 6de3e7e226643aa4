"""Formats of a comparison agree on the numbers, the marks and what was allowed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

import phaselens
from phaselens.report.comparison_formats import COMPARISON_FORMATS
from tests.toys import letters, toy_lens

TEXTS = [letters(6 + 2 * index, index) for index in range(6)]


@pytest.fixture(scope="module")
def comparison() -> Any:
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a|x"), (1, "b"))]
    run = phaselens.run(lenses, metrics=["sinks", "bos-mlp"], texts=TEXTS)
    return replace(phaselens.compare(run), notes=["a <note>"], allowed=["bos: a|x has none"])


def written(comparison: Any, name: str) -> str:
    file = io.StringIO()
    COMPARISON_FORMATS[name](comparison, file)
    return file.getvalue()


def test_csv_and_json_hold_every_difference(comparison: Any) -> None:
    values = json.loads(written(comparison, "json"))
    records = list(csv.DictReader(io.StringIO(written(comparison, "csv"))))
    names = [column["name"] for column in values["differences"]["columns"]]
    assert list(records[0]) == names
    assert len(records) == len(values["differences"]["rows"]) == len(comparison.differences.rows)
    for record, row in zip(records, values["differences"]["rows"], strict=True):
        assert list(record.values()) == ["" if value is None else str(value) for value in row]
    assert values["allowed"] == ["bos: a|x has none"]
    assert values["n_differences"] == comparison.n_differences


def test_markdown_marks_what_the_terminal_marks(comparison: Any) -> None:
    markdown, terminal = written(comparison, "markdown"), written(comparison, "table")
    assert markdown.splitlines()[0] == "### b − a\\|x"
    assert markdown.count("●") == terminal.count("●")
    heading = next(line for line in markdown.splitlines() if line.startswith("| layer"))
    assert heading == "| layer | a\\|x | b | difference | 95 % interval | p | d\\_z | texts |"
    for text in (f"{comparison.n_differences} differences were tested", "compared although they differ: bos"):
        assert text in markdown
        assert text in " ".join(terminal.split())
    assert "- note: a &lt;note>" in markdown
