"""Sweeps as heatmaps, on a terminal and as a figure. Colours diverge from 0: blue is positive, orange negative."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from rich.console import Console
from rich.style import Style
from rich.text import Text

from phaselens.data.new_files import whole_file
from phaselens.errors import InputError
from phaselens.patching import Sweep
from phaselens.patching.wording import number_text
from phaselens.report.drawing import INK, hatch_missing, new_figure
from phaselens.report.figure_data import EffectGrid, effect_grid, effect_grid_by_layer
from phaselens.report.numbers import DECIMAL, UNMEASURED, significant
from phaselens.report.strings import printable, shortened
from phaselens.report.terminal_layout import WIDTH, plain_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's blue and vermilion, distinct for all common kinds of colour vision; the sign repeats the distinction.
_UP, _DOWN = (0, 114, 178), (213, 94, 0)
_MAX_ROWS = 48
_MAX_PROMPT_WIDTH = 80
_MAX_TICK_LABELS = 48
_NUMBER_WIDTH, _NINTHS_WIDTH = 8, 3


def print_sweep(sweep: Sweep, output: Console) -> None:
    """Print the effect of every cell, coloured; a cell that was not measured is empty."""
    for line in lines(sweep, output.width):
        output.print(line, no_wrap=True, crop=True)


def as_text(sweep: Sweep, width: int = WIDTH) -> str:
    """Return the heatmap as plain text."""
    return plain_text(lambda output: print_sweep(sweep, output), width)


def lines(sweep: Sweep, width: int) -> list[Text]:
    """Return a heatmap in at most `width` columns: numbers where they fit, else ninths of the largest effect."""
    total = sweep.clean - sweep.base
    subtitle = (
        f"effect on {printable(sweep.metric)}; the full difference is {number_text(total, signed=True)}, "
        f"from {number_text(sweep.base)} to {number_text(sweep.clean)}"
    )
    heatmap = [Text(printable(sweep.title), style="bold"), Text(subtitle, style="dim")]
    heatmap += grid_lines(effect_grid(sweep), _largest_effect(sweep), width)
    return [*heatmap, Text(f"bos: {sweep.bos}", style="dim")]


def grid_lines(grid: EffectGrid, largest: float, width: int, *, signed: bool = True) -> list[Text]:
    """Return the cells in at most `width` columns, coloured by their share of `largest`."""
    corner = f"{grid.row_axis} \\ {grid.column_axis}"
    label_width = max(len(label) for label in [*grid.row_labels, corner])
    n_columns = len(grid.column_labels)
    has_numbers = label_width + _NUMBER_WIDTH * n_columns <= width
    cell_width = _NUMBER_WIDTH if has_numbers else _NINTHS_WIDTH
    columns_per_block = max(1, (width - label_width) // cell_width)
    rows = _strongest_rows(grid.effects)
    heatmap = []
    for first_column in range(0, n_columns, columns_per_block):
        columns = range(first_column, min(first_column + columns_per_block, n_columns))
        labels = "".join(f"{grid.column_labels[column]:>{cell_width}}" for column in columns)
        heatmap.append(Text(f"{corner:<{label_width}}{labels}", style="bold"))
        for row in rows:
            line = Text(f"{grid.row_labels[row]:<{label_width}}")
            for column in columns:
                line.append(*_cell(grid.effects[row, column], largest, has_numbers, signed))
            heatmap.append(line)
    n_left_out = len(grid.row_labels) - len(rows)
    if n_left_out:
        heatmap.append(
            Text(f"{DECIMAL.write(n_left_out)} more rows with smaller values: see the figure", style="dim")
        )
    if not has_numbers:
        legend = f"9 is {significant(largest, 4)}; a dot is a cell that does not exist or was not measured"
        heatmap.append(Text(legend, style="dim"))
    return heatmap


def _largest_effect(sweep: Sweep) -> float:
    """Return the largest absolute effect of the sweep."""
    import numpy as np

    effects = np.abs(sweep.effect.compressed())
    return float(effects[np.isfinite(effects)].max(initial=0.0))


def _strongest_rows(effects: np.ma.MaskedArray[Any, Any]) -> list[int]:
    """Return the indices of all rows, or of those with the largest effects if there are too many for a terminal."""
    n_rows = len(effects)
    if n_rows <= _MAX_ROWS:
        return list(range(n_rows))
    strengths = [float(abs(row).max()) if row.count() else -1.0 for row in effects]
    return sorted(sorted(range(n_rows), key=lambda row: -strengths[row])[:_MAX_ROWS])


def _cell(cell: SupportsFloat, largest: float, has_numbers: bool, signed: bool) -> tuple[str, Style]:
    """Return a cell's text and colour; `cell` is a number, or NumPy's `masked` where it was not measured."""
    import numpy as np

    width = _NUMBER_WIDTH if has_numbers else _NINTHS_WIDTH
    if cell is np.ma.masked:
        return UNMEASURED.rjust(width), Style(dim=True)
    value = float(cell)
    share = value / largest if largest else 0.0
    if share != share or abs(share) > 1:
        return (significant(value, 1) if has_numbers else "?").rjust(width), Style()
    if has_numbers:
        return number_text(value, signed=signed).rjust(width), _style(share)
    ninths = round(9 * share)
    return str(ninths).rjust(width), _style(share) if ninths else Style(dim=True)


def _style(share: float) -> Style:
    """Return a background between white and the full colour; none if the effect is close to 0."""
    if abs(share) < 0.04:
        return Style()
    full_colour = _UP if share > 0 else _DOWN
    mixture = [round(255 + (channel - 255) * abs(share)) for channel in full_colour]
    # Black or white, whichever contrasts more with the mixture, by its relative luminance.
    weights = (0.2126, 0.7152, 0.0722)
    luminance = sum(weight * (channel / 255) ** 2.2 for weight, channel in zip(weights, mixture, strict=True))
    ink = "#000000" if luminance > 0.18 else "#ffffff"
    return Style.parse(f"{ink} on #{mixture[0]:02x}{mixture[1]:02x}{mixture[2]:02x}")


def figure(*sweeps: Sweep) -> Figure:
    """Draw the sweeps side by side on one colour scale; missing cells are hatched.

    Raises:
        InputError: if no sweep is given.
    """
    if not sweeps:
        raise InputError("figure: no sweep was given")
    largest = max(map(_largest_effect, sweeps)) or 1.0
    grids = [effect_grid_by_layer(sweep) for sweep in sweeps]
    widths = [max(2.4, 0.24 * len(grid.column_labels)) for grid in grids]
    height = max(2.6, 1.9 + 0.24 * max(len(grid.row_labels) for grid in grids))
    drawing, axes = new_figure(
        min(1.6 + sum(widths), 24.0), min(height, 16.0), columns=len(sweeps), width_ratios=widths
    )
    for panel, sweep, grid in zip(axes[0], sweeps, grids, strict=True):
        image = _draw_panel(panel, sweep.title, grid, largest)
    bar = drawing.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label(_drawable(f"effect on {sweeps[0].metric}"), fontsize=8, parse_math=False)
    of_model = f"{sweeps[0].model}; " if sweeps[0].model else ""
    ends = f"{of_model}{sweeps[0].metric}: corrupt {number_text(sweeps[0].base)}, clean {number_text(sweeps[0].clean)}"
    drawing.suptitle(
        _drawable(ends) + _prompts_line(sweeps[0]), x=0.01, ha="left", fontsize=9, color=INK, parse_math=False
    )
    return drawing


def _prompts_line(sweep: Sweep) -> str:
    """Return a second line with both prompts, shortened; empty for the mean over pairs, whose words differ."""
    if "…" in sweep.clean_words:
        return ""
    texts = ("".join(map(_unquoted, words)) for words in (sweep.clean_words, sweep.corrupt_words))
    clean, corrupt = (_drawable(shortened(text, _MAX_PROMPT_WIDTH)) for text in texts)
    return f"\nclean: {clean}\ncorrupt: {corrupt}"


def _unquoted(word: str) -> str:
    """Return a token's text without its quotes."""
    return word[1:-1] if word[:1] == word[-1:] and word[:1] in ("'", '"') else f"{word} "


def _draw_panel(panel: Axes, title: str, grid: EffectGrid, largest: float) -> AxesImage:
    hatch_missing(panel)
    image = panel.imshow(
        grid.effects,
        cmap=effect_colours(),
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
    )
    panel.set_title(_drawable(title), fontsize=9, color=INK, loc="left", parse_math=False)
    for axis, labels in ((panel.xaxis, grid.column_labels), (panel.yaxis, grid.row_labels)):
        indices = range(0, len(labels), -(-len(labels) // _MAX_TICK_LABELS))
        axis.set_ticks(
            list(indices), [_drawable(labels[index]) for index in indices], fontsize=7, parse_math=False
        )
    if grid.column_axis == "position":
        panel.xaxis.set_tick_params(rotation=90)
    panel.set_ylabel(grid.row_axis, fontsize=8)
    panel.set_xlabel(grid.column_axis, fontsize=8)
    return image


def effect_colours() -> Colormap:
    """Return the terminal's colours as a colour map, white at 0."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = [tuple(channel / 255 for channel in colour) for colour in (_DOWN, (255, 255, 255), _UP)]
    return LinearSegmentedColormap.from_list("effect", ends)


def _drawable(text: str) -> str:
    """Return `text` with □ for each character that the figure's font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(character if font.get_char_index(ord(character)) else "□" for character in printable(text))


def save(sweeps: Sequence[Sweep], path: str | os.PathLike[str]) -> Path:
    """Write `figure(*sweeps)` to a file; its extension sets the format.

    Raises:
        InputError: if the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if target.suffix == ".svg" else None
        with whole_file(target) as partial:
            figure(*sweeps).savefig(partial, format=target.suffix.removeprefix("."), metadata=metadata)
    except (OSError, ValueError) as error:
        raise InputError(f"the figure cannot be written to {target}: {error}") from error
    return target
