"""A comparison on the terminal: the displayed values, the mark, the number of tests, and the notes."""

from __future__ import annotations

import re
from typing import Any

import pytest

import phaselens
from phaselens.report.comparison_tables import comparison_tables
from tests.toys import letters, toy_lens

TEXTS = [letters(6 + 2 * index, index) for index in range(6)]


@pytest.fixture(scope="module")
def comparison() -> Any:
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b [x]"))]
    run = phaselens.run(lenses, metrics=["sinks", "bos-mlp", "massive-values"], texts=TEXTS)
    return phaselens.compare(run)


@pytest.mark.slow
def test_each_metric_has_a_table_of_its_displayed_value(comparison: Any) -> None:
    tables = list(comparison_tables(comparison))
    assert [table.caption.split(";")[0] for table in tables] == [
        "sinks: score, share of attention",
        "bos-mlp: loss over the baseline, nats/token",
        "massive-values: count_global, cells",
    ]
    assert [table.row_title for table in tables] == ["layer", "condition", "group"]
    assert "2 more values with --format json or csv" in tables[0].caption


def test_marked_rows_are_those_whose_interval_excludes_zero(comparison: Any) -> None:
    records = [
        r for r in comparison.differences.records() if r["metric"] == "sinks" and r["value"] == "score"
    ]
    (table, *_) = comparison_tables(comparison)
    for record, row in zip(records, table.rows, strict=True):
        cells = row.cells[0]
        assert cells is not None
        assert cells[2].is_marked == bool(record["excludes_zero"])


def test_the_text_counts_the_tests_and_names_the_models(comparison: Any) -> None:
    text = str(comparison)
    assert "b [x] − a" in text
    assert re.search(
        rf"^{comparison.n_differences} differences were tested by sign flips of texts; p is adjusted",
        text,
        re.MULTILINE,
    )
    assert max(map(len, text.splitlines())) <= 100
