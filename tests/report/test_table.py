"""Display tables keep numbers, intervals, nulls and marks, for formats that print them and for figures."""

from __future__ import annotations

import math

import pytest

from phaselens.plugin import plugins
from phaselens.report.builders import layer_table, legend, model_table, result_table
from phaselens.report.figure_data import model_points
from phaselens.report.table import DisplayCell, DisplayTable
from phaselens_plugins.sinks import Sinks
from tests.report.runs import made_run


@pytest.fixture
def by_layer() -> DisplayTable:
    assert Sinks.display is not None
    run = made_run()
    return layer_table(run, run.metrics["sinks"], Sinks.display)


def test_cells_carry_value_interval_null_and_mark(by_layer: DisplayTable) -> None:
    assert by_layer.models == ["rope", "drope"]
    assert [row.layer for row in by_layer.rows] == [0, 1, 2]
    cells = [row.cells[0][0] for row in by_layer.rows if row.cells[0] is not None]
    assert cells == [
        DisplayCell(0.1, 0.05, 0.2, 0.02),
        DisplayCell(0.625, 0.5, 0.75, 0.02, is_marked=True),
        DisplayCell(None),
    ]
    assert by_layer.notes == ["● sink-heavy: half of the heads or more, and more than the null"]


def test_one_column_is_printed_as_value_interval_and_null(by_layer: DisplayTable) -> None:
    assert by_layer.titles() == ["sink rate", "95 % interval", "null"]
    assert by_layer.titles(short=True) == ["sink rate", "95 % CI", "null"]
    printed = by_layer.printed(by_layer.rows[1].cells[1])
    assert [tuple(cell) for cell in printed] == [
        ("● 62.5 %", "marked"),
        ("50.0–75.0", "value"),
        ("2.0 %", "null"),
    ]
    assert [cell.text for cell in by_layer.printed(None)] == ["–"] * 3


def test_figures_draw_the_same_cells_in_percent(by_layer: DisplayTable) -> None:
    points = model_points(by_layer, 1, by_layer.columns[0])
    assert [point.layer for point in points] == [0.0, 1.0, 2.0]
    assert (points[1].value, points[1].low, points[1].high, points[1].null) == (62.5, 50.0, 75.0, 2.0)
    assert math.isnan(points[2].value)


def test_lists_have_one_group_of_cells_and_units() -> None:
    assert Sinks.display is not None
    run = made_run()
    models = model_table(run, run.metrics["sinks"], Sinks.display)
    assert (models.is_list, [row.name for row in models.rows]) == (True, ["rope", "drope"])
    records = result_table("sinks.layers", run.rows("sinks", "layers"))
    assert [column.align for column in records.columns[:2]] == ["left", "right"]
    assert records.columns[1].unit == "index"
    assert len(records.rows) == 6


def test_the_caption_says_what_the_interval_and_the_null_mean(by_layer: DisplayTable) -> None:
    assert by_layer.caption == (
        "95 % interval: percentile bootstrap over texts; null: sink_rate if all attention were uniform"
    )


def test_every_displayed_interval_and_null_has_a_meaning() -> None:
    for name in plugins().names:
        metric = plugins().metric(name)
        if metric.display is None:
            continue
        specs = {column.name: column for column in metric.spec(metric.display.table).columns}
        meanings = legend(metric.display, specs)
        assert ("95 % interval: " in meanings) == bool(metric.display.low), name
        assert ("null: " in meanings) == bool(metric.display.null), name
