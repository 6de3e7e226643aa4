"""Figures that the page shows as pictures: those that metrics draw themselves, and effects of conditions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phaselens.report.figures import metric_figures
from phaselens.report.strings import printable
from phaselens.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Characters of all pictures together.
MAX_CHARACTERS = 600_000


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and the name of its figure. `source` is empty for one that did not fit."""

    name: str
    source: str


def pictures(run: Run) -> dict[str, list[Picture]]:
    """Return the pictures by metric.

    A metric's own figure comes from the run directory where its plugin is not imported.
    """
    chosen: dict[str, list[Picture]] = {}
    n_left = MAX_CHARACTERS
    for metric, name, content in _contents(run):
        source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
        fits = len(source) <= n_left
        n_left -= len(source) if fits else 0
        chosen.setdefault(metric, []).append(Picture(printable(name), source if fits else ""))
    return chosen


def _contents(run: Run) -> Iterator[tuple[str, str, bytes]]:
    """Yield (metric, name, SVG) of each figure that the page does not draw itself."""
    for metric, result in run.metrics.items():
        if not result.metric.prints or not result.tables:
            continue
        display = result.metric.display
        stored = None if run.directory is None else run.directory / "figures" / f"{metric}.svg"
        if result.metric.plots or (display is not None and display.rows == "condition"):
            for name, figure in metric_figures(run, metric, result):
                if name != f"{metric}-heads":
                    yield metric, name, _svg(figure)
        elif stored is not None and getattr(result.metric, "has_own_figure", False) and stored.is_file():
            yield metric, metric, stored.read_bytes()


def _svg(figure: Figure) -> bytes:
    """Return a figure as SVG with its letters as text, which is smaller than with outlines."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phaselens"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
