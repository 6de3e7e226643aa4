"""Effects of many conditions as heatmaps: layers × heads of one condition, or conditions × layers.

A forest of a thousand rows cannot be read, and a panel for each of fifty conditions cannot either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phaselens.report.condition_tables import recorded_condition
from phaselens.report.drawing import INK, hatch_missing, lettering, new_figure, whole_numbers
from phaselens.report.figure_data import finite
from phaselens.report.heatmap import effect_colours
from phaselens.report.table import DisplayColumn, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from phaselens.errors import FloatArray

#: Conditions that one figure shows; the others are in the table.
_MAX_CONDITIONS = 6
_MAX_ROWS = 80
_MAX_LABEL_WIDTH = 28
_MAX_HEIGHT = 14.0

RecordsByModel = Mapping[str, Sequence[Record]]


def heads_figure(records: RecordsByModel, effect: DisplayColumn, title: str, *, signed: bool) -> Figure:
    """Draw a panel of layers × heads for each condition and model, on one scale; missing cells are hatched."""
    names = list(dict.fromkeys(recorded_condition(record) for rows in records.values() for record in rows))
    shown = names[:_MAX_CONDITIONS]
    shape = [
        1 + max(_index(record[axis]) for rows in records.values() for record in rows)
        for axis in ("layer", "head")
    ]
    grids = [[_grid(rows, name, effect, (shape[0], shape[1])) for rows in records.values()] for name in shown]
    height = max(1.7, 0.7 + 0.2 * shape[0])
    figure, axes = new_figure(
        1.6 + 3.0 * len(records),
        min(1.1 + height * len(shown), _MAX_HEIGHT),
        rows=len(shown),
        columns=len(records),
    )
    limits = _limits([grid for row in grids for grid in row], signed=signed)
    for name, row_axes, row_grids in zip(shown, axes, grids, strict=True):
        for label, panel, grid in zip(records, row_axes, row_grids, strict=True):
            image = _draw(panel, grid, limits, signed=signed)
            panel.set_title(
                lettering(f"{label}: {name}", _MAX_LABEL_WIDTH), loc="left", fontsize=8.5, color=INK
            )
            whole_numbers(panel.xaxis)
            whole_numbers(panel.yaxis)
        row_axes[0].set_ylabel("layer", fontsize=8.5)
    for panel in axes[-1]:
        panel.set_xlabel("head", fontsize=8.5)
    more = f"; {len(names) - len(shown)} more conditions are in the table" if len(names) > len(shown) else ""
    _finish(figure, axes, image, effect, f"{title}{more}")
    return figure


def layers_figure(
    records: RecordsByModel, names: Sequence[str], effect: DisplayColumn, title: str, *, signed: bool
) -> Figure:
    """Draw conditions down and layers across, one panel per model on one scale; missing cells are hatched."""
    shown = list(names)[:_MAX_ROWS]
    n_layers = 1 + max(
        _index(record["layer"])
        for rows in records.values()
        for record in rows
        if record["layer"] is not None and recorded_condition(record) in shown
    )
    grids = []
    for rows in records.values():
        lines = [_grid(rows, name, effect, (n_layers, 1))[:, 0] for name in shown]
        grids.append(_stack(lines))
    labels = [lettering(name, _MAX_LABEL_WIDTH) for name in shown]
    figure, axes = new_figure(
        1.6 + 0.07 * max(map(len, labels)) + 3.0 * len(records),
        min(1.3 + 0.19 * len(shown), _MAX_HEIGHT),
        columns=len(records),
        sharey=True,
    )
    limits = _limits(grids, signed=signed)
    for label, panel, grid in zip(records, axes[0], grids, strict=True):
        image = _draw(panel, grid, limits, signed=signed)
        panel.set_title(lettering(label, _MAX_LABEL_WIDTH), loc="left", fontsize=8.5, color=INK)
        panel.set_xlabel("layer", fontsize=8.5)
        whole_numbers(panel.xaxis)
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize=7.5)
    more = f"; {len(names) - len(shown)} more conditions are in the table" if len(names) > len(shown) else ""
    _finish(figure, axes, image, effect, f"{title}{more}")
    return figure


def _index(value: object) -> int:
    return value if isinstance(value, int) else 0


def _grid(records: Sequence[Record], name: str, effect: DisplayColumn, shape: tuple[int, int]) -> FloatArray:
    """Return the effects [layer, head] of one condition, NaN where it has none."""
    import numpy as np

    grid = np.full(shape, np.nan)
    for record in records:
        if recorded_condition(record) == name and record["layer"] is not None:
            head = _index(record.get("head"))
            grid[_index(record["layer"]), head] = finite(record[effect.name], effect.number_format.factor)
    return grid


def _stack(lines: Sequence[FloatArray]) -> FloatArray:
    import numpy as np

    return np.stack(lines)


def _limits(grids: Sequence[FloatArray], *, signed: bool) -> tuple[float, float]:
    """Return the ends of the colour scale: symmetric around 0 for effects that have a sign."""
    import numpy as np

    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    if not values.size:
        return (-1.0, 1.0) if signed else (0.0, 1.0)
    if signed:
        largest = float(np.abs(values).max()) or 1.0
        return -largest, largest
    return min(0.0, float(values.min())), float(values.max())


def _draw(panel: Axes, grid: FloatArray, limits: tuple[float, float], *, signed: bool) -> AxesImage:
    hatch_missing(panel)
    image: AxesImage = panel.imshow(
        grid,
        cmap=effect_colours() if signed else "cividis",
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
    )
    panel.tick_params(labelsize=7.5)
    return image


def _finish(figure: Figure, axes: object, image: AxesImage, effect: DisplayColumn, title: str) -> None:
    import numpy as np

    bar = figure.colorbar(image, ax=list(np.ravel(np.asarray(axes))), shrink=0.9)
    bar.set_label(effect.title, fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
