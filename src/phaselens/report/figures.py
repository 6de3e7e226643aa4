"""Figures of a run; `draw(run, folder)` writes each, by default as PNG and SVG.

They are curves by layer with intervals and nulls, effects of conditions, heatmaps of layers × heads, and the figure
sets that metrics contribute to. Only matplotlib's object interface is used, so no global state changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, NamedTuple

from phaselens.data.new_files import partial_path, whole_file
from phaselens.errors import InputError, close_matches
from phaselens.plugin import Display, FigurePanel, FigureSet
from phaselens.report.builders import layer_table, model_labels
from phaselens.report.drawing import (
    COLOURS,
    DASHES,
    HIGH,
    INK,
    MARKERS,
    WIDE,
    bare,
    empty_figure,
    hatch_missing,
    lettering,
    new_figure,
    whole_numbers,
)
from phaselens.report.drawing_sizes import set_width
from phaselens.report.figure_data import head_grids, model_points
from phaselens.report.figure_titles import subject_of, title_of
from phaselens.report.forest import condition_figures
from phaselens.report.strings import heading
from phaselens.runs import MetricResult, Run, guarded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Formats of figures, each with its settings: no dates, so that the files of two runs are equal.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 300},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
DEFAULT_FORMATS = ("png", "svg")
# Fonts that journals accept, and equal names of parts each time.
_FONTS: Any = {"pdf.fonttype": 42, "svg.hashsalt": "phaselens"}
# Values are drawn on a logarithmic axis if the largest is more than this many times the smallest.
_MAX_LINEAR_RATIO = 50.0


def draw(
    run: Run, folder: str | Path, *, formats: Sequence[str] = DEFAULT_FORMATS, width: float | None = None
) -> list[Path]:
    """Write every figure that the run's tables allow into `folder`, and return the files.

    Args:
        run: the run.
        folder: where the files are written.
        formats: names of `FORMATS`.
        width: the width of each figure, in inches; None for its own.

    Raises:
        InputError: for another format, or if the folder cannot be created or written to.
    """
    import matplotlib

    for name in formats:
        if name not in FORMATS:
            raise InputError(f"no figure format {name!r}; {close_matches(name, FORMATS)}")
    target = Path(folder)
    paths = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(run):
            if width is not None:
                set_width(figure, width)
            for extension in formats:
                path = target / f"{name}.{extension}"
                with matplotlib.rc_context(_FONTS), whole_file(path) as partial:
                    figure.savefig(partial, format=extension, **FORMATS[extension])
                paths.append(path)
    except OSError as error:
        raise InputError(f"figures cannot be written to {target}: {error.strerror or error}") from error
    return paths


def draw_in_directory(run: Run) -> list[Path]:
    """Write the figures of a run with a directory into its folder `figures`, which appears with all of them at once.

    A folder that exists is left as it is.

    Raises:
        InputError: if the folder cannot be written to.
    """
    if run.directory is None:
        return []
    folder = run.directory / "figures"
    if folder.exists():
        return []
    with partial_path(folder) as partial:
        try:
            paths = draw(run, partial)
            if not folder.exists():
                partial.rename(folder)
        except OSError as error:
            raise InputError(f"figures cannot be written to {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return [folder / path.name for path in paths]


def figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure): each metric's curve or effects, its layers × heads, then the figure sets."""
    for name, result in run.metrics.items():
        yield from metric_figures(run, name, result)
    yield from _figure_sets(run)


def metric_figures(run: Run, name: str, result: MetricResult) -> list[tuple[str, Figure]]:
    """Return (name, figure) of each figure of one metric; an exception is recorded as the metric's failure."""
    drawn: list[tuple[str, Figure]] = []
    with guarded(result, "all models", "plot"):
        drawn.extend(_figures_of(run, name, result))
    return drawn


def _figures_of(run: Run, name: str, result: MetricResult) -> Iterator[tuple[str, Figure]]:
    """Yield the figure that the metric draws, or else that of its display; then its layers × heads."""
    display = result.metric.display
    if result.tables and result.metric.plots:
        figure = empty_figure(WIDE, HIGH)
        result.metric.plot(result.tables, figure)
        own_title = figure.get_suptitle()
        title = f"{own_title}\n{subject_of(run)}" if own_title else title_of(run, result.metric)
        _set_title(figure, title)
        figure.draw_without_rendering()  # an error is raised here, not on saving
        yield name, figure
    elif display is not None and display.table in result.tables:
        if display.rows == "condition":
            yield from ((name + ending, figure) for ending, figure in condition_figures(run, result, display))
        else:
            yield name, _curve_figure(run, result, display)
    if display is not None and display.by_head and "heads" in result.tables:
        yield f"{name}-heads", _heads_figure(run, result, display.by_head)


def _curve_figure(run: Run, result: MetricResult, display: Display) -> Figure:
    figure, axes = new_figure(WIDE, HIGH)
    _curve(axes[0, 0], run, result, display)
    _set_title(figure, title_of(run, result.metric, display.title))
    return figure


def _set_title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)


def _curve(axes: Axes, run: Run, result: MetricResult, display: Display, *, has_legend: bool = True) -> None:
    """Draw one column by layer: one line per model, its interval as a band, its null dashed in the same colour."""
    table = layer_table(run, result, display)
    column = table.columns[0]
    is_percent = column.number_format.style == "percent"
    values: list[float] = []
    for model_index, (label, colour, marker) in enumerate(
        zip(table.models, cycle(COLOURS), cycle(MARKERS), strict=False)
    ):
        points = model_points(table, model_index, column)
        layers = [point.layer for point in points]
        curve = [point.value for point in points]
        axes.plot(
            layers, curve, color=colour, marker=marker, markersize=4, linewidth=1.6, label=lettering(label)
        )
        values += curve
        if column.low and column.high:
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        if column.null:
            null = [point.null for point in points]
            axes.plot(layers, null, color=colour, linestyle=DASHES, linewidth=1.1, alpha=0.8)
            values += null
    if column.null:
        axes.plot([], [], color=INK, linestyle=DASHES, linewidth=1.1, label="null")
    if _wants_log(values):
        axes.set_yscale("log")
    elif is_percent:
        axes.set_ylim(-3, 103)
    axes.set_xlabel("layer")
    unit = "%" if is_percent else column.unit or ""
    axes.set_ylabel(f"{column.title} ({unit})" if unit and unit not in column.title else column.title)
    bare(axes)
    whole_numbers(axes.xaxis)
    if has_legend:
        axes.legend(frameon=False, fontsize=8)


def _wants_log(values: Sequence[float]) -> bool:
    present = [value for value in values if value == value]
    return bool(present) and min(present) > 0 and max(present) / min(present) > _MAX_LINEAR_RATIO


def _heads_figure(run: Run, result: MetricResult, column: str) -> Figure:
    """Draw layers down and heads across, one panel per model on one scale; missing values are hatched."""
    import numpy as np

    table = result.tables["heads"]
    grids = head_grids(run, result, column)
    values = np.concatenate([grid[~np.isnan(grid)] for grid in grids])
    highest = max(1.0, float(values.max())) if values.size else 1.0
    height = max(2.4, 0.9 + 0.26 * max(len(grid) for grid in grids))
    figure, axes = new_figure(1.2 + 2.7 * len(grids), min(height, 9.0), columns=len(grids))
    for panel, grid, label in zip(axes[0], grids, model_labels(run), strict=True):
        hatch_missing(panel)
        image = panel.imshow(
            grid, cmap="cividis", vmin=0.0, vmax=highest, aspect="auto", interpolation="nearest"
        )
        panel.set_title(lettering(label, 28), fontsize=9, color=INK)
        panel.set_xlabel("head")
        for axis in (panel.xaxis, panel.yaxis):
            whole_numbers(axis)
    axes[0, 0].set_ylabel("layer")
    unit = table.spec.columns[table.spec.index(column)].unit
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label(f"{heading(column)} ({unit})" if unit else heading(column), fontsize=8)
    _set_title(figure, title_of(run, result.metric, f"{heading(column)} by head"))
    return figure


def _figure_sets(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield the metrics' figure sets: one figure per panel, and one page of all panels if none is missing."""
    sets: dict[FigureSet, dict[str, _SetPanel]] = {}
    for result in run.metrics.values():
        for panel in result.metric.figure_panels:
            if panel.display.table in result.tables:
                sets.setdefault(panel.figure_set, {})[panel.name] = _SetPanel(panel, result)
    for figure_set, panels in sets.items():
        ordered = [panels[name] for name in figure_set.panels if name in panels]
        for panel, result in ordered:
            if panel.summary_only or _is_own_curve(result, panel.display):
                continue
            figure, axes = new_figure(WIDE, HIGH)
            with guarded(result, "all models", "plot"):
                _curve(axes[0, 0], run, result, panel.display)
                _set_title(figure, title_of(run, result.metric, panel.display.title))
            yield f"{figure_set.name}-{panel.name}", figure
        if len(ordered) == len(figure_set.panels):
            yield f"{figure_set.name}-summary", _summary_page(run, ordered)


def _is_own_curve(result: MetricResult, display: Display) -> bool:
    """Return whether the metric's own figure is this curve already."""
    own = result.metric.display
    if own is None or result.metric.plots or own.rows != "layer":
        return False
    names = ("table", "value", "low", "high", "null")
    return all(getattr(own, name) == getattr(display, name) for name in names)


class _SetPanel(NamedTuple):
    """A panel of a figure set, and the result that it draws."""

    panel: FigurePanel
    result: MetricResult


def _summary_page(run: Run, panels: Sequence[_SetPanel]) -> Figure:
    """Draw all panels of a figure set on one page, two per row."""
    n_rows = -(-len(panels) // 2)
    figure, axes = new_figure(2 * 5.0, n_rows * 3.4, rows=n_rows, columns=2)
    for index, (panel, result) in enumerate(panels):
        with guarded(result, "all models", "plot"):
            _curve(axes.flat[index], run, result, panel.display, has_legend=False)
            name = lettering(result.metric.title or result.metric.name)
            title = f"{ascii_lowercase[index]}  {name}: {panel.display.title}"
            axes.flat[index].set_title(title, loc="left", fontsize=10, color=INK)
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    _set_title(figure, f"{subject_of(run)}\nbands: 95 % intervals over texts; dashed: null")
    return figure
