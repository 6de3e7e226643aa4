"""Titles of figures: what is shown, of which models, on which texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Metric
from phaselens.report.drawing import lettering

if TYPE_CHECKING:
    from phaselens.runs import Run

_MAX_LABELS, _MAX_LABEL_WIDTH, _MAX_SOURCE_WIDTH = 4, 28, 40


def title_of(run: Run, metric: type[Metric[Any]], quantity: str = "") -> str:
    """Return the title of a metric's figure in two lines; the second one names the models and the texts."""
    name = lettering(metric.title or metric.name)
    return f"{name}: {quantity}\n{subject_of(run)}" if quantity else f"{name}\n{subject_of(run)}"


def subject_of(run: Run) -> str:
    """Return the labels of the run's models, and the number and source of its texts.

    Texts that were given as strings have no source.
    """
    labels = [lettering(model.info.label, _MAX_LABEL_WIDTH) for model in run.models]
    n_more = len(labels) - _MAX_LABELS
    models = ", ".join(labels[:_MAX_LABELS]) + (f" and {n_more} more" if n_more > 0 else "")
    texts = "1 text" if len(run.texts) == 1 else f"{len(run.texts):,} texts"
    source = run.options.get("texts")
    of_source = ""
    if isinstance(source, str) and source != "given":
        of_source = f" ({lettering(Path(source).name or source, _MAX_SOURCE_WIDTH)})"
    return f"{models}; {texts}{of_source}"
