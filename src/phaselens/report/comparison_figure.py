"""A figure of a comparison: the difference of each metric's displayed value by layer, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phaselens.report.drawing import COLOURS, INK, bare, lettering, new_figure, signed_scale, whole_numbers
from phaselens.report.table import Record
from phaselens.runs import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL_WIDTH, _PANEL_HEIGHT = 3.6, 2.7
_MAX_NAMES = 12


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw one panel per metric: points by layer, or by condition where a metric has no layers to compare."""
    records = comparison.differences.records()
    metrics = list(comparison.displayed.items())
    n_columns = min(_COLUMNS, len(metrics))
    n_rows = -(-len(metrics) // n_columns)
    figure, axes = new_figure(_PANEL_WIDTH * n_columns, _PANEL_HEIGHT * n_rows + 0.4, n_rows, n_columns)
    for panel, (metric, value) in zip(axes.flat, metrics, strict=False):
        displayed_records = [
            record for record in records if record["metric"] == metric and record["value"] == value
        ]
        _draw_panel(panel, displayed_records)
        unit = displayed_records[0]["unit"]
        panel.set_title(lettering(f"{metric}: {value}{f', {unit}' if unit else ''}", 46), fontsize=8)
    for panel in list(axes.flat)[len(metrics) :]:
        panel.axis("off")
    title = lettering(f"{comparison.second} − {comparison.first}, paired by text; bars: 95 % intervals")
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_panel(axes: Axes, records: Sequence[Record]) -> None:
    """Draw differences against the layer, in one colour per group; against the rows if they have no layers."""
    bare(axes)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    by_layer = all(record["layer"] is not None for record in records)
    if by_layer:
        names = list(dict.fromkeys(_name(record) for record in records))
        for colour, name in zip(COLOURS * len(names), names, strict=False):
            members = [record for record in records if _name(record) == name]
            _draw_points(axes, [_number(record["layer"]) for record in members], members, colour, name)
        axes.set_xlabel("layer", fontsize=8)
        whole_numbers(axes.xaxis)
        if names != [""]:
            axes.legend(fontsize=6)
    else:
        _draw_points(axes, list(range(len(records))), records, COLOURS[0], "")
        labels = [lettering(_name(record) or f"layer {record['layer']}", 24) for record in records]
        axes.set_xlim(-0.5, len(labels) - 0.5)
        if len(labels) <= _MAX_NAMES:
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=6)
        else:
            axes.set_xticks([])
    ends = [_number(record[name]) for record in records for name in ("difference", "ci_low", "ci_high")]
    signed_scale(axes, "y", ends)
    axes.tick_params(labelsize=7)


def _draw_points(
    axes: Axes, positions: Sequence[float], records: Sequence[Record], colour: str, name: str
) -> None:
    values = [_number(record["difference"]) for record in records]
    bars = [
        [value - _number(record["ci_low"]) for value, record in zip(values, records, strict=True)],
        [_number(record["ci_high"]) - value for value, record in zip(values, records, strict=True)],
    ]
    axes.errorbar(
        positions,
        values,
        yerr=bars,
        fmt="o",
        markersize=3,
        color=colour,
        elinewidth=1,
        label=lettering(name, 24),
    )


def _name(record: Record) -> str:
    return " ".join(str(record[column]) for column in ("condition", "group") if record[column] is not None)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
