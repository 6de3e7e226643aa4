"""Figures of conditions: a forest plot of effects with their intervals, and curves by layer for sweeps.

Both draw a display table of two columns: the layer and the effect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING

from phaselens.plugin import BASELINE, CellValue, Display
from phaselens.report.builders import column_specs, main_column, model_labels, model_records
from phaselens.report.condition_heatmap import heads_figure, layers_figure
from phaselens.report.condition_tables import (
    RowKey,
    aligned_rows,
    conditions_by_control,
    control_name_beside,
    recorded_condition,
)
from phaselens.report.drawing import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    bare,
    lettering,
    new_figure,
    signed_scale,
    whole_numbers,
)
from phaselens.report.figure_data import FigurePoint, model_points
from phaselens.report.figure_titles import title_of
from phaselens.report.numbers import NumberFormat, condition_format
from phaselens.report.table import (
    CONTROL_PREFIX,
    LAYER_COLUMN,
    DisplayColumn,
    DisplayRow,
    DisplayTable,
    Record,
)
from phaselens.runs import MetricResult, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A condition in at least this many layers of one model is a sweep.
MIN_SWEPT_LAYERS = 3
_MAX_NAME_WIDTH = 60
#: Rows of a forest, and panels of curves, beyond which neither can be read.
_MAX_ROWS, _MAX_PANELS = 40, 8
_MAX_SPACED_ROWS = 20
_MAX_LABEL_WIDTH = 28
_NATS = DisplayColumn(
    "delta_nats",
    "Δ nats per token",
    NumberFormat("compact", reference=0.0),
    "nats/token",
    low="delta_low",
    high="delta_high",
)


def condition_figures(run: Run, result: MetricResult, display: Display) -> Iterator[tuple[str, Figure]]:
    """Yield (suffix of the name, figure): the forest plot, conditions swept over layers, and those of single heads.

    Swept conditions are curves, or a heatmap if there are many; conditions of heads are heatmaps of layers × heads.
    """
    effect = _effect_column(result, display)
    all_records = {label: model_records(result, display.table, label) for label in model_labels(run)}
    records = {
        label: [record for record in rows if record.get("head") is None]
        for label, rows in all_records.items()
    }
    of_heads = {
        label: [record for record in rows if record.get("head") is not None and record["layer"] is not None]
        for label, rows in all_records.items()
    }
    swept = _swept_conditions(records)
    if _has_zero(effect):
        records = _without(records, {BASELINE.name})
    single = _without(records, set(swept))
    controls = conditions_by_control(result)
    title = title_of(run, result.metric)
    signed = _has_zero(effect)
    if any(single.values()):
        table, note = _largest_rows(_effect_table(single, effect))
        yield "", _forest(table, controls, title, note)
    n_panels = sum(controls.get(name) not in swept for name in swept)
    if n_panels > _MAX_PANELS:
        yield "-by-layer", layers_figure(records, swept, effect, title, signed=signed)
    elif swept:
        yield "-by-layer", _sweep_curves(_effect_table(records, effect), swept, controls, title)
    if any(of_heads.values()):
        yield "-by-head", heads_figure(of_heads, effect, title, signed=signed)


def _largest_rows(table: DisplayTable) -> tuple[DisplayTable, str]:
    """Return the table, or its rows with the largest effects if there are too many, and a note that says so."""
    n_rows = len(table.rows)
    if n_rows <= _MAX_ROWS:
        return table, ""

    def size(row: DisplayRow) -> float:
        values = [cells[1].value for cells in row.cells if cells is not None]
        return max((abs(value) for value in values if isinstance(value, int | float)), default=-1.0)

    largest = sorted(range(n_rows), key=lambda index: -size(table.rows[index]))[:_MAX_ROWS]
    rows = [table.rows[index] for index in sorted(largest)]
    return replace(table, rows=rows), f"the {_MAX_ROWS} largest of {n_rows:,} effects"


def _effect_column(result: MetricResult, display: Display) -> DisplayColumn:
    """Return the column of differences in nats if the table has it, else the display's column."""
    specs = column_specs(result, display.table)
    if {_NATS.name, _NATS.low, _NATS.high} <= specs.keys():
        return _NATS
    spec = specs[display.value]
    column = main_column(display, spec, condition_format(spec, display))
    is_percent = column.number_format.style == "percent"
    return replace(column, title=f"{display.title} (%)") if is_percent else column


def _effect_table(records: Mapping[str, Sequence[Record]], effect: DisplayColumn) -> DisplayTable:
    columns = (LAYER_COLUMN, effect)
    rows = aligned_rows(records, recorded_condition, columns)
    return DisplayTable(columns, rows, "conditions", list(records))


def _has_zero(effect: DisplayColumn) -> bool:
    """Return whether 0 means no effect; the axis then gets a line at 0."""
    return effect is _NATS


def _without(records: Mapping[str, Sequence[Record]], conditions: Collection[str]) -> dict[str, list[Record]]:
    return {
        label: [record for record in rows if recorded_condition(record) not in conditions]
        for label, rows in records.items()
    }


def _swept_conditions(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the names of the conditions that at least one model has in many layers, in order."""
    names: dict[str, None] = {}
    for rows in records.values():
        layers: dict[str, set[CellValue]] = {}
        for record in rows:
            if record["layer"] is not None:
                layers.setdefault(recorded_condition(record), set()).add(record["layer"])
        names |= dict.fromkeys(name for name, indices in layers.items() if len(indices) >= MIN_SWEPT_LAYERS)
    return list(names)


def _forest(table: DisplayTable, controls: Mapping[str, str], title: str, note: str = "") -> Figure:
    """Draw conditions down, effects across, a colour and marker per model, hollow controls beneath their condition."""
    effect = table.columns[1]
    keys = [(row.name, row.occurrence) for row in table.rows]
    ordered = _beneath_conditions(keys, controls)
    heights = {key: height for height, key in enumerate(ordered)}
    labels = [_row_label(name, controls) for name, _ in ordered]
    is_dense = len(keys) > _MAX_SPACED_ROWS
    step = 0.1 + 0.07 * len(table.models) if is_dense else 0.14 + 0.11 * len(table.models)
    figure, panels = new_figure(4.6 + 0.075 * max(map(len, labels)), 1.3 + step * len(keys))
    axes = panels[0, 0]
    values: list[float] = []
    styles = zip(table.models, _offsets(len(table.models)), cycle(COLOURS), cycle(MARKERS), strict=False)
    for model_index, (label, offset, colour, marker) in enumerate(styles):
        axes.plot(
            [], [], color=colour, marker=marker, linestyle="none", label=lettering(label, _MAX_LABEL_WIDTH)
        )
        for point in model_points(table, model_index, effect):
            key = keys[point.row]
            _draw_point(
                axes, point, effect, heights[key] + offset, colour, marker, is_hollow=key[0] in controls
            )
            values += [point.value, point.low, point.high]
    if _has_zero(effect):
        axes.axvline(0, color=INK, linewidth=0.9)
    if any(name in controls for name, _ in keys):
        axes.plot([], [], color=INK, marker="o", markerfacecolor="white", linestyle="none", label="control")
    if effect.null:
        axes.plot([], [], color=INK, marker="|", markersize=9, linestyle="none", label="null")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=7 if is_dense else 8.5)
    for height, (name, _) in enumerate(ordered):
        if height and name not in controls:
            axes.axhline(height - 0.5, color="#cccccc", linewidth=0.6)
    for tick, (name, _) in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color("#666666" if name in controls else INK)
    scale = signed_scale(axes, "x", values) if _has_zero(effect) else ""
    axes.set_xlabel(effect.title, fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    bare(axes, "x")
    axes.spines["left"].set_visible(False)
    _add_title_and_legend(figure, axes, title, ["bars: 95 % intervals" if effect.low else "", scale, note])
    return figure


def _draw_point(
    axes: Axes,
    point: FigurePoint,
    effect: DisplayColumn,
    height: float,
    colour: str,
    marker: str,
    *,
    is_hollow: bool,
) -> None:
    """Draw one condition of one model: interval, value, null, and the layer at the right edge."""
    axes.plot(
        [point.low, point.high],
        [height, height],
        color=colour,
        linewidth=1.4,
        alpha=0.6 if is_hollow else 1.0,
    )
    fill = "white" if is_hollow else colour
    axes.plot(point.value, height, color=colour, marker=marker, markersize=5, markerfacecolor=fill)
    if effect.null:
        axes.plot(point.null, height, color=colour, marker="|", markersize=9)
    if isfinite(point.layer):
        axes.annotate(
            LAYER_COLUMN.number_format.write(int(point.layer)),
            (1.005, height),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=7,
            va="center",
        )


def _beneath_conditions(keys: Sequence[RowKey], controls: Mapping[str, str]) -> list[RowKey]:
    """Return `keys` with every control moved to beneath its condition."""
    ordered: list[RowKey] = []
    for key in keys:
        if (controls.get(key[0]), key[1]) in keys:
            continue
        ordered.append(key)
        ordered += [control for control in keys if (controls.get(control[0]), control[1]) == key]
    return ordered


def _row_label(name: str, controls: Mapping[str, str]) -> str:
    condition_name = controls.get(name)
    if condition_name is None:
        return lettering(name, _MAX_NAME_WIDTH)
    return CONTROL_PREFIX + lettering(control_name_beside(name, condition_name), _MAX_NAME_WIDTH)


def _offsets(n_models: int) -> list[float]:
    """Return the height of each model's points within a row, around 0."""
    if n_models == 1:
        return [0.0]
    spread = 0.44
    return [spread * (model_index / (n_models - 1) - 0.5) for model_index in range(n_models)]


def _sweep_curves(
    table: DisplayTable, swept: Sequence[str], controls: Mapping[str, str], title: str
) -> Figure:
    """Draw one panel per swept condition: the effect by layer, one line per model, its control's dashed."""
    effect = table.columns[1]
    panels = [name for name in swept if controls.get(name) not in swept]
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    width = 6.4 if n_columns == 1 else 9.6
    figure, axes = new_figure(width, 0.9 + 3.1 * n_rows, rows=n_rows, columns=n_columns, sharey=True)
    points = [model_points(table, model_index, effect) for model_index in range(len(table.models))]
    values: list[float] = []
    for panel, name in zip(axes.flat, panels, strict=False):
        for condition_name in [name, *(control for control in swept if controls.get(control) == name)]:
            styles = zip(table.models, points, cycle(COLOURS), cycle(MARKERS), strict=False)
            for label, model_curve, colour, marker in styles:
                curve = [point for point in model_curve if table.rows[point.row].name == condition_name]
                _draw_curve(panel, curve, colour, marker, label if condition_name == name else None)
                for point in curve:
                    values += [point.value, point.low, point.high]
        if _has_zero(effect):
            panel.axhline(0, color=INK, linewidth=0.9)
        panel.set_title(lettering(name, _MAX_NAME_WIDTH), loc="left", fontsize=9, color=INK)
        panel.set_xlabel("layer")
        bare(panel)
        whole_numbers(panel.xaxis)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    if any(controls.get(name) in swept for name in swept):
        axes[0, 0].plot([], [], color=INK, linestyle=DASHES, linewidth=1.1, label="control")
    scale = ""
    for panel in axes.flat[: len(panels)] if _has_zero(effect) else []:
        scale = signed_scale(panel, "y", values)
    for panel_row in axes:
        panel_row[0].set_ylabel(effect.title)
    notes = ["bands: 95 % intervals" if effect.low else "", scale]
    _add_title_and_legend(figure, axes[0, 0], title, notes)
    return figure


def _draw_curve(
    panel: Axes, points: Sequence[FigurePoint], colour: str, marker: str, label: str | None
) -> None:
    """Draw one model's line and band; a control's line (`label` None) is dashed."""
    layers = [point.layer for point in points]
    curve = [point.value for point in points]
    if label is None:
        panel.plot(layers, curve, color=colour, linestyle=DASHES, linewidth=1.1, alpha=0.8)
    else:
        label = lettering(label, _MAX_LABEL_WIDTH)
        panel.plot(layers, curve, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
    low, high = [point.low for point in points], [point.high for point in points]
    panel.fill_between(layers, low, high, color=colour, alpha=0.08 if label is None else 0.18, linewidth=0)


def _add_title_and_legend(figure: Figure, axes: Axes, title: str, notes: Sequence[str]) -> None:
    """Add the title above, and the legend below the axes, where it cannot hide a point."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=4, frameon=False, fontsize=8, alignment="left",
        title="; ".join(note for note in notes if note), title_fontsize=8,
    )  # fmt: skip
