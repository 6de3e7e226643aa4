"""Sweeps as heatmaps: on a terminal, and as a figure. Colours diverge from 0, blue up and orange down."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from phaselens.errors import InputError
from phaselens.patching import Sweep
from phaselens.report import words

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, which all common kinds of colour vision tell apart; the sign says it too.
_UP, _DOWN = (0, 114, 178), (213, 94, 0)
_INK = "#333333"
_WORD = 14
_MOST_ROWS = 48
_MOST_WORDS = 48


def print_sweep(sweep: Sweep, to: Console) -> None:
    """The effect of every cell, coloured; a cell that was not measured is empty."""
    for line in lines(sweep, to.width):
        to.print(line, no_wrap=True, crop=True)


def as_text(sweep: Sweep, width: int = 100) -> str:
    """The same without colours."""
    file = io.StringIO()
    plain = Console(file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    print_sweep(sweep, plain)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def lines(sweep: Sweep, width: int) -> list[Text]:
    """A heatmap in at most `width` columns: numbers where they fit, else ninths of the largest effect."""
    grid, down, across, axes = _flat(sweep)
    head = max(len(label) for label in [*down, axes])
    limit = _limit(sweep)
    numbers = head + 8 * len(across) <= width
    cell = 8 if numbers else 3
    fit = max(1, (width - head) // cell)
    rows = _worth_showing(grid)
    ends = (sweep.clean - sweep.base, sweep.base, sweep.clean)
    found = [
        Text(words.plain(sweep.title), style="bold"),
        Text(
            f"effect on {words.plain(sweep.metric)}; the whole way is {ends[0]:+.4f}, from {ends[1]:.4f} "
            f"to {ends[2]:.4f}",
            style="dim",
        ),
    ]
    for first in range(0, len(across), fit):
        some = range(first, min(first + fit, len(across)))
        found.append(
            Text(f"{axes:<{head}}" + "".join(f"{across[place]:>{cell}}" for place in some), style="bold")
        )
        for row in rows:
            line = Text(f"{down[row]:<{head}}")
            for place in some:
                line.append(*_cell(grid[row, place], limit, numbers))
            found.append(line)
    if len(rows) < len(down):
        found.append(
            Text(f"{len(down) - len(rows)} more rows with smaller effects: see the figure", style="dim")
        )
    if not numbers:
        found.append(
            Text(f"9 is {limit:.4g}; a dot is a cell that is not there or was not measured", style="dim")
        )
    return [*found, Text(f"bos: {sweep.bos}", style="dim")]


def _flat(sweep: Sweep) -> tuple[np.ma.MaskedArray[Any, Any], list[str], list[str], str]:
    """Effects as a table with labels of its rows and columns, and what these are."""
    grid = sweep.grid()
    layers = [str(layer) for layer in sweep.layers]
    if sweep.axes == ("layer", "pos"):
        return grid.T, _positions(sweep), layers, "pos \\ layer"
    heads = [str(head) for head in range(grid.shape[-1])]
    if sweep.axes == ("layer", "head"):
        return grid, layers, heads, "layer \\ head"
    by_head = grid.transpose(0, 2, 1).reshape(-1, grid.shape[1])
    down = [f"{layer}.{head}" for layer in layers for head in heads]
    return by_head, down, [str(pos) for pos in range(grid.shape[1])], "layer.head \\ pos"


def _positions(sweep: Sweep) -> list[str]:
    """Position and token, `5 ' Paris'`; both prompts' tokens where they differ."""
    labels = []
    for place, (one, other) in enumerate(zip(sweep.clean_words, sweep.corrupt_words, strict=True)):
        word = words.shortened(one, _WORD)
        labels.append(
            f"{place} {word}" if one == other else f"{place} {word}≠{words.shortened(other, _WORD)}"
        )
    return labels


def _limit(sweep: Sweep) -> float:
    """The largest effect of the sweep, either way."""
    import numpy as np

    effect = np.abs(sweep.effect.compressed())
    return float(effect[np.isfinite(effect)].max(initial=0.0))


def _worth_showing(grid: np.ma.MaskedArray[Any, Any]) -> list[int]:
    """All rows, or those with the largest effects where there are too many for a terminal."""
    n = len(grid)
    if n <= _MOST_ROWS:
        return list(range(n))
    strength = [float(abs(row).max()) if row.count() else -1.0 for row in grid]
    return sorted(sorted(range(n), key=lambda row: -strength[row])[:_MOST_ROWS])


def _cell(value: Any, limit: float, numbers: bool) -> tuple[str, Style]:
    import numpy as np

    if value is np.ma.masked:
        return f"{'·':>{8 if numbers else 3}}", Style(dim=True)
    share = float(value) / limit if limit else 0.0
    if share != share or abs(share) > 1:
        return f"{float(value):8.1g}" if numbers else "  ?", Style()
    if numbers:
        return f"{float(value):+8.4f}", _style(share)
    ninths = round(9 * share)
    return f"{ninths:3d}", _style(share) if ninths else Style(dim=True)


def _style(share: float) -> Style:
    """Background between white and the full colour; none where there is next to nothing."""
    if abs(share) < 0.04:
        return Style()
    full = _UP if share > 0 else _DOWN
    mixed = [round(255 + (channel - 255) * abs(share)) for channel in full]
    # Whichever of the two stands out more from the mixture, by its relative luminance.
    bright = sum(
        part * (channel / 255) ** 2.2 for part, channel in zip((0.2126, 0.7152, 0.0722), mixed, strict=True)
    )
    ink = "#000000" if bright > 0.18 else "#ffffff"
    return Style.parse(f"{ink} on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}")


def figure(*sweeps: Sweep) -> Figure:
    """The sweeps side by side, on one scale of colours; what is missing is hatched.

    Raises:
        InputError: for no sweep.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not sweeps:
        raise InputError("figure: no sweep was given")
    limit = max(map(_limit, sweeps)) or 1.0
    sizes = [_flat_for_figure(sweep)[0].shape for sweep in sweeps]
    widths = [max(2.4, 0.24 * size[1]) for size in sizes]
    height = max(2.6, 1.9 + 0.24 * max(size[0] for size in sizes))
    made = Figure(figsize=(min(1.6 + sum(widths), 24.0), min(height, 16.0)), dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, len(sweeps), squeeze=False, width_ratios=widths)
    for panel, sweep in zip(axes[0], sweeps, strict=True):
        image = _panel(panel, sweep, limit)
    bar = made.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label(_drawable(f"effect on {sweeps[0].metric}"), fontsize=8, parse_math=False)
    ends = f"{sweeps[0].metric}: corrupt {sweeps[0].base:.4f}, clean {sweeps[0].clean:.4f}"
    made.suptitle(_drawable(ends), x=0.01, ha="left", fontsize=9, color=_INK, parse_math=False)
    return made


def _flat_for_figure(
    sweep: Sweep,
) -> tuple[np.ma.MaskedArray[Any, Any], list[str], list[str], tuple[str, str]]:
    """Layers (and heads) down, positions or heads across."""
    grid, down, across, _ = _flat(sweep)
    if sweep.axes == ("layer", "pos"):
        return grid.T, across, down, ("layer", "position")
    if sweep.axes == ("layer", "head"):
        return grid, down, across, ("layer", "head")
    return grid, down, _positions(sweep), ("layer.head", "position")


def _panel(panel: Axes, sweep: Sweep, limit: float) -> Any:
    grid, down, across, names = _flat_for_figure(sweep)
    panel.set_facecolor("#eeeeee")
    panel.patch.set_hatch("///")
    panel.patch.set_edgecolor("#bbbbbb")
    image = panel.imshow(
        grid, cmap=_colours(), vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    panel.set_title(_drawable(sweep.title), fontsize=9, color=_INK, loc="left", parse_math=False)
    for axis, labels, turned in ((panel.xaxis, across, names[1] == "position"), (panel.yaxis, down, False)):
        step = -(-len(labels) // _MOST_WORDS)
        places = range(0, len(labels), step)
        axis.set_ticks(
            list(places), [_drawable(labels[place]) for place in places], fontsize=7, parse_math=False
        )
        if turned:
            axis.set_tick_params(rotation=90)
    panel.set_ylabel(names[0], fontsize=8)
    panel.set_xlabel(names[1], fontsize=8)
    return image


def _colours() -> Any:
    """The terminal's colours, white at 0."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = [tuple(channel / 255 for channel in colour) for colour in (_DOWN, (255, 255, 255), _UP)]
    return LinearSegmentedColormap.from_list("effect", ends)


def _drawable(text: str) -> str:
    """`text` with signs that the figure's font lacks as boxes."""
    from matplotlib.font_manager import findfont, get_font

    font: Any = get_font(findfont("DejaVu Sans"))
    return "".join(sign if font.get_char_index(ord(sign)) else "□" for sign in words.plain(text))


def save(sweeps: Sequence[Sweep], path: str | os.PathLike[str]) -> Path:
    """Write `figure(*sweeps)` to a file; its ending says the format.

    Raises:
        InputError: where it cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure(*sweeps).savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InputError(f"the figure cannot be written to {target}: {error}") from error
    return target
