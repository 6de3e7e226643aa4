"""A run as pictures: `draw(run, folder)` writes each as PNG and SVG.

Layer curves with intervals, models side by side and the null beside them; effects of conditions; pictures of layers ×
heads; and a set of four on sinks, BOS norm and compression. matplotlib's object interface only, so nothing global is
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.plugin import Display
from phaselens.report import words
from phaselens.report.drawing import (
    COLOURS,
    DASHES,
    HIGH,
    INK,
    MARKERS,
    WIDE,
    bare,
    finite,
    lettering,
    new_figure,
    whole_numbers,
)
from phaselens.report.forest import condition_figures
from phaselens.runs import MetricResult, Run, guarded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
# Values that span more than this are drawn on a logarithmic axis.
_SPAN = 50.0


def draw(run: Run, folder: str | Path) -> list[Path]:
    """Write every figure that the run's tables allow into `folder`, and return the files.

    InputError if the folder cannot be made or written.
    """
    target = Path(folder)
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(run):
            for form in FORMATS:
                path = target / f"{name}.{form}"
                figure.savefig(path, format=form, metadata={"Date": None} if form == "svg" else None)
                written.append(path)
    except OSError as error:
        raise InputError(f"figures cannot be written to {target}: {error.strerror or error}") from error
    return written


def figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each: a metric's curve or effects, layers × heads where it has them, and the set of four."""
    for name, result in run.metrics.items():
        drawn: list[tuple[str, Figure]] = []
        with guarded(result, "all models", "plot"):
            drawn.extend(_figures_of(run, name, result))
        yield from drawn
    yield from _study_set(run)


def _figures_of(run: Run, name: str, result: MetricResult) -> Iterator[tuple[str, Figure]]:
    """A metric's own picture in place of the curve, where it draws one."""
    display = result.metric.display
    if result.tables and result.metric.plots:
        figure, _ = new_figure(WIDE, HIGH, rows=0)
        result.metric.plot(result.tables, figure)
        figure.draw_without_rendering()  # what is wrong in it shows here, and not when it is saved
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
    axes[0, 0].set_title(lettering(result.metric.title or result.metric.name), loc="left", color=INK)
    return figure


def _curve(axes: Axes, run: Run, result: MetricResult, display: Display) -> None:
    """One column by layer: a line a model, its interval as a band, its null dashed in the same colour."""
    table = result.tables[display.table]
    records = table.records()
    unit = table.spec.columns[table.spec.index(display.value)].unit
    factor = 100.0 if display.percent else 1.0
    seen: list[float] = []
    for model, colour, marker in zip(run.models, cycle(COLOURS), cycle(MARKERS), strict=False):
        label = model.info.label
        mine = [record for record in records if record["model"] == label]
        layers = [finite(record["layer"]) for record in mine]
        value = [factor * finite(record[display.value]) for record in mine]
        axes.plot(
            layers, value, color=colour, marker=marker, markersize=4, linewidth=1.6, label=lettering(label)
        )
        seen += value
        if display.low and display.high:
            low, high = (
                [factor * finite(record[end]) for record in mine] for end in (display.low, display.high)
            )
            axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        if display.null:
            null = [factor * finite(record[display.null]) for record in mine]
            axes.plot(layers, null, color=colour, linestyle=DASHES, linewidth=1.1, alpha=0.8)
            seen += null
    if display.null:
        axes.plot([], [], color=INK, linestyle=DASHES, linewidth=1.1, label="null")
    if _wants_log(seen):
        axes.set_yscale("log")
    elif display.percent:
        axes.set_ylim(-3, 103)
    axes.set_xlabel("layer")
    shown = "%" if display.percent else unit or ""
    axes.set_ylabel(f"{display.title} ({shown})" if shown and shown not in display.title else display.title)
    bare(axes)
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize=8)


def _wants_log(values: Sequence[float]) -> bool:
    finite = [value for value in values if value == value]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > _SPAN


def _heads_figure(run: Run, result: MetricResult, column: str) -> Figure:
    """Layers down, heads across, a panel a model, one scale for all; what is missing is hatched."""
    import numpy as np

    table = result.tables["heads"]
    grids = []
    for model in run.models:
        mine = [record for record in table.records() if record["model"] == model.info.label]
        n_layers, n_heads = model.info.n_layers, model.info.n_heads
        grid = np.full((n_layers, n_heads), np.nan)
        for record in mine:
            grid[int(finite(record["layer"])), int(finite(record["head"]))] = finite(record[column])
        grids.append(grid)
    known = np.concatenate([grid[~np.isnan(grid)] for grid in grids])
    high = max(1.0, float(known.max())) if known.size else 1.0
    height = max(2.4, 0.9 + 0.26 * max(len(grid) for grid in grids))
    figure, axes = new_figure(1.2 + 2.7 * len(grids), min(height, 9.0), columns=len(grids))
    for panel, grid, model in zip(axes[0], grids, run.models, strict=True):
        panel.set_facecolor("#eeeeee")
        panel.patch.set_hatch("///")
        panel.patch.set_edgecolor("#bbbbbb")
        image = panel.imshow(
            grid, cmap="cividis", vmin=0.0, vmax=high, aspect="auto", interpolation="nearest"
        )
        panel.set_title(lettering(model.info.label, 28), fontsize=9, color=INK)
        panel.set_xlabel("head")
        for axis in (panel.xaxis, panel.yaxis):
            whole_numbers(axis)
    axes[0, 0].set_ylabel("layer")
    spec = table.spec.columns[table.spec.index(column)]
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label(
        f"{words.heading(column)} ({spec.unit})" if spec.unit else words.heading(column), fontsize=8
    )
    figure.suptitle(f"{lettering(result.metric.title)}: by head", x=0.02, ha="left", fontsize=11, color=INK)
    return figure


#: The set of four: file name, metric, column, its ends, null, title, whether it is a share.
_SET: tuple[tuple[str, str, Display], ...] = (
    (
        "study-sink-rate", "sinks",
        Display("sink_rate", "sink rate", low="ci_low", high="ci_high", null="null_rate", percent=True),
    ),
    ("study-bos-norm", "bos-norm", Display("bos_norm", "BOS norm", low="ci_low", high="ci_high", null="null")),
    ("study-entropy", "compression", Display("entropy", "matrix entropy", low="ci_low", high="ci_high", null="null")),
)  # fmt: skip
_ANISOTROPY = Display(
    "anisotropy",
    "anisotropy p₁",
    low="anisotropy_low",
    high="anisotropy_high",
    null="anisotropy_null",
    percent=True,
)


def _study_set(run: Run) -> Iterator[tuple[str, Figure]]:
    """Sink rate, BOS norm and entropy by layer, one figure each, and all with the anisotropy on one page."""
    there = [
        entry for entry in _SET if entry[1] in run.metrics and entry[2].table in run.metrics[entry[1]].tables
    ]
    for name, metric, display in there:
        figure, axes = new_figure(WIDE, HIGH)
        _curve(axes[0, 0], run, run.metrics[metric], display)
        axes[0, 0].set_title(f"{display.title} by layer", loc="left", color=INK)
        yield name, figure
    if len(there) < len(_SET):
        return
    figure, axes = new_figure(2 * 5.0, 2 * 3.4, rows=2, columns=2)
    panels = [*((metric, display) for _, metric, display in there), ("compression", _ANISOTROPY)]
    for panel, letter, (metric, display) in zip(axes.flat, "abcd", panels, strict=True):
        _curve(panel, run, run.metrics[metric], display)
        panel.set_title(f"{letter}  {display.title}", loc="left", fontsize=10, color=INK)
    n_texts = len(run.texts)
    figure.suptitle(
        f"{' and '.join(lettering(model.info.label) for model in run.models)}, {n_texts} texts; bands: 95 % "
        "intervals over texts; dashed: null",
        x=0.01, ha="left", fontsize=10, color=INK,
    )  # fmt: skip
    yield "study-summary", figure
