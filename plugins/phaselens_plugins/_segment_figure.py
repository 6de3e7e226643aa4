"""The figure of `segments`: what is looked at by depth of the needle and length of the prompt, model by model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phaselens.plugin import Table
from phaselens_plugins._drawing import INK, Record, escaped, records_by_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

#: Column of `cells`, the column of `summary` with the layer that is drawn, and the title.
_ROWS = (
    ("retrieval", "retrieval_layer", "retrieval score, best head"),
    ("needle", "needle_layer", "attention on the needle"),
)


def draw_cells(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw one grid of depths and lengths for each model: of its best retrieval head, and of the layer that attends
    most to the needle. The models of a row share its colours."""
    cells, summaries = records_by_model(tables["cells"]), records_by_model(tables["summary"])
    labels = [label for label in cells if label in summaries]
    figure.set_size_inches(1.6 + 3.0 * len(labels), 5.6)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(_ROWS), len(labels), squeeze=False)
    for row, (column, layer_column, title) in zip(panels, _ROWS, strict=True):
        grids = []
        for label in labels:
            layer = summaries[label][0][layer_column]
            grids.append([record for record in cells[label] if record["layer"] == layer])
        values = [float(record[column] or 0.0) for records in grids for record in records]
        highest = max(values, default=0.0) or 1.0
        image = None
        for axes, label, records in zip(row, labels, grids, strict=True):
            where = summaries[label][0][layer_column]
            axes.set_title(
                f"{escaped(label)}, layer {where}" if records else f"{escaped(label)}: missing",
                loc="left", fontsize=9, color=INK,
            )  # fmt: skip
            image = _draw_grid(axes, records, column, highest) or image
        row[0].set_ylabel("depth of the needle", fontsize=8)
        if image is not None:
            figure.colorbar(image, ax=list(row), shrink=0.9).set_label(title, fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("tokens of the prompt", fontsize=8)


def _draw_grid(axes: Axes, records: Sequence[Record], column: str, highest: float) -> AxesImage | None:
    """Draw lengths across and depths down; a cell without prompts, or without a value, stays white."""
    if not records:
        axes.set_axis_off()
        return None
    lengths, depths = (sorted({record[name] for record in records}) for name in ("length", "depth"))  # type: ignore[type-var]
    value_of = {(record["depth"], record["length"]): record[column] for record in records}
    grid = [
        [
            value if isinstance(value := value_of.get((depth, length)), int | float) else math.nan
            for length in lengths
        ]
        for depth in depths
    ]
    image = axes.imshow(grid, cmap="cividis", vmin=0.0, vmax=highest, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    return image
