"""A figure of a comparison: the difference of each metric's displayed value by layer, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phaselens.data.new_files import whole_file
from phaselens.errors import InputError
from phaselens.report.drawing import COLOURS, INK, bare, lettering, new_figure, signed_scale, whole_numbers
from phaselens.report.table import Record
from phaselens.runs import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL_WIDTH, _PANEL_HEIGHT = 3.6, 2.7
_MIN_WIDTH = 5.2
_MAX_NAMES = 12


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw one panel per metric: points by layer, or by condition where a metric has no layers to compare."""
    records = comparison.differences.records()
    metrics = list(comparison.displayed.items())
    n_columns = min(_COLUMNS, len(metrics))
    n_rows = -(-len(metrics) // n_columns)
    width = max(_PANEL_WIDTH * n_columns, _MIN_WIDTH)
    figure, axes = new_figure(width, _PANEL_HEIGHT * n_rows + 0.6, n_rows, n_columns)
    for panel, (metric, value) in zip(axes.flat, metrics, strict=False):
        displayed_records = [
            record for record in records if record["metric"] == metric and record["value"] == value
        ]
        _draw_panel(panel, displayed_records)
        unit = displayed_records[0]["unit"]
        panel.set_title(lettering(f"{metric}: {value}{f', {unit}' if unit else ''}", 46), fontsize=8)
    for panel in list(axes.flat)[len(metrics) :]:
        panel.axis("off")
    first, second = comparison.titles
    n_texts = max(count for record in records if isinstance(count := record["n_texts"], int))
    of_texts = "1 text" if n_texts == 1 else f"{n_texts:,} texts"
    title = lettering(f"{second} − {first}, paired by text; {of_texts}", 80)
    n_differences = f"{comparison.n_differences:,} differences in all"
    figure.suptitle(
        f"{title}\nbars: 95 % intervals, filled where they exclude 0; {n_differences}", fontsize=8
    )
    return figure


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the figure of a comparison to a file; its suffix says the format: .png, .svg or .pdf.

    Raises:
        InputError: for another suffix, or a file that cannot be written.
    """
    suffix = require_suffix(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        with whole_file(Path(path)) as partial:
            comparison_figure(comparison).savefig(partial, format=suffix, metadata=metadata)
    except OSError as error:
        raise InputError(f"the figure {str(path)!r} cannot be written: {error.strerror or error}") from error


def require_suffix(path: str | Path) -> str:
    """Return the format that a figure's file has by its suffix; raise InputError for another suffix."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise InputError(f"figure {str(path)!r}: the file's name must end with .png, .svg or .pdf")
    return suffix


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
    axes.errorbar(positions, values, yerr=bars, fmt="none", ecolor=colour, elinewidth=1)
    fills = [colour if record["excludes_zero"] else "white" for record in records]
    axes.scatter(
        positions, values, s=14, c=fills, edgecolors=colour, linewidths=1, zorder=3, label=lettering(name, 24)
    )


def _name(record: Record) -> str:
    return " ".join(
        str(record[column]) for column in ("condition", "group", "label") if record[column] is not None
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
