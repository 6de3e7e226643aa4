"""Sizes of figures for print: a width with a unit, and a figure redrawn at that width with readable letters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phaselens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72}
_MIN_WIDTH, _MAX_WIDTH = 1.5, 40.0
#: The smallest letters, in points: journals ask for 5 to 7.
_MIN_FONT = 5.5
_WIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*(in|cm|mm|pt)?")


def parse_width(text: str) -> float:
    """Return a width in inches; a number without a unit is in inches.

    >>> parse_width("3.3in"), round(parse_width("84 mm"), 3)
    (3.3, 3.307)

    Raises:
        InputError: for other text, or a width that no figure can have.
    """
    match = _WIDTH.fullmatch(text.strip())
    if match is None:
        raise InputError(f"figure width {text!r}: write a number with in, cm, mm or pt, such as 3.3in")
    width = float(match[1]) * _INCHES[match[2] or "in"]
    if not _MIN_WIDTH <= width <= _MAX_WIDTH:
        raise InputError(f"figure width {text!r} is {width:g} inches; give {_MIN_WIDTH:g} to {_MAX_WIDTH:g}")
    return width


def set_width(figure: Figure, width: float) -> None:
    """Resize a figure to a width in inches. Letters and lines shrink less than the figure and stay legible."""
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    old_width, old_height = figure.get_size_inches()
    factor = width / old_width
    # A narrow figure is a little taller in proportion, for the letters that do not shrink with it.
    figure.set_size_inches(width, old_height * factor * max(1.0, factor**-0.35))
    softened = min(1.0, factor**0.55)
    for text in figure.findobj(Text):
        text.set_fontsize(max(_MIN_FONT, text.get_fontsize() * softened))
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * softened)
        line.set_markersize(line.get_markersize() * softened)
    for axes in figure.axes:
        axes.tick_params(labelsize=max(_MIN_FONT, 10 * softened), width=0.8 * softened)
