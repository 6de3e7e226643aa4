"""Quantities, tables and figure of `position-curves`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from phaselens.plugin import Column, Table, TableSpec
from phaselens_plugins._common import LAYER, N_TEXTS, TEXT, interval_columns
from phaselens_plugins._drawing import INK, bare, draw_line, numbers, records_by_model, styles
from phaselens_plugins._layer_metric import Quantity
from phaselens_plugins._position_bins import BEYOND, FIRST, LAST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = "share of attention"
QUANTITIES = (
    Quantity("sink", SHARE, "on position 0, mean over the bin's queries that see it, and over heads",
             "uniform attention: 1 over the keys that a query sees"),
    Quantity("entropy", "share of maximum",
             "entropy over ln(keys seen), mean over the bin's queries that see two or more, and over heads",
             "uniform attention"),
    Quantity("norm", "norm", "‖x_t‖ of the residual stream after the layer, mean over the bin's positions"),
    Quantity("cosine", "cosine", "cos(x_t, x₀) after the layer, mean over the bin's positions"),
)  # fmt: skip
N_POSITIONS = Column("n_positions", int, "positions", "positions of the text in the bin")
LOSS_COLUMN = Column("loss", float, "nats/token", "mean loss of the tokens at the bin's positions")
LOSS_NULL = Column("loss_null", float, "nats/token", "loss of a uniform guess: ln of the vocabulary's size")
PANELS = (
    ("loss", "loss (nats/token)"),
    ("sink", "attention on position 0"),
    ("entropy", "entropy / maximum"),
    ("norm", "norm of the residual stream"),
    ("cosine", "cosine with position 0"),
)


def quantity_columns(with_intervals: bool) -> Iterator[Column]:
    """Yield the columns of the four quantities, with their intervals if `with_intervals`."""
    for quantity in QUANTITIES:
        yield Column(quantity.name, float, quantity.unit, quantity.help)
        if with_intervals:
            yield from interval_columns(quantity.unit, f"{quantity.name}_low", f"{quantity.name}_high")
        if quantity.null:
            yield Column(f"{quantity.name}_null", float, quantity.unit, quantity.null)


TABLES = (
    TableSpec(
        "texts",
        (TEXT, LAYER, FIRST, LAST, *quantity_columns(False), N_POSITIONS),
        "one row per text, layer and bin that the text reaches",
    ),
    TableSpec(
        "losses",
        (TEXT, FIRST, LAST, LOSS_COLUMN, N_POSITIONS),
        "one row per text and bin that the text reaches",
    ),
    TableSpec(
        "layers",
        (LAYER, FIRST, LAST, BEYOND, *quantity_columns(True), N_TEXTS),
        "one row per layer and bin: means over texts",
    ),
    TableSpec(
        "bins",
        (
            Column("condition", str, None, "the bin's positions"),
            Column("layer", int, "index", "missing: the row is for all layers"),
            FIRST,
            LAST,
            BEYOND,
            LOSS_COLUMN,
            *interval_columns("nats/token", "loss_low", "loss_high"),
            LOSS_NULL,
            *quantity_columns(True),
            N_TEXTS,
            Column("n_positions", int, "positions", "positions of all texts in the bin"),
        ),
        "one row per bin: means over texts and layers",
    ),
    TableSpec(
        "summary",
        (
            Column("n_ctx_trained", int, "tokens", "the length that the model was trained for"),
            Column("loss_within", float, "nats/token", "mean loss of tokens up to that length"),
            Column("loss_beyond", float, "nats/token", "mean loss of later tokens"),
            Column("sink_within", float, SHARE, "sink of queries up to that length, mean over layers"),
            Column("sink_beyond", float, SHARE, "sink of later queries, mean over layers"),
            N_TEXTS,
        ),
        "one row per model",
    ),
)


def draw_curves(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw the five curves, one line per model, with the trained lengths as vertical lines."""
    figure.set_size_inches(10.0, 6.0)
    panels = figure.subplots(2, 3, squeeze=False)
    curves = records_by_model(tables["bins"])
    trained = {
        label: numbers(rows, "n_ctx_trained")[0]
        for label, rows in records_by_model(tables["summary"]).items()
    }
    for axes, (column, title) in zip(panels.flat, PANELS, strict=False):
        for label, style in styles(list(curves)).items():
            rows = curves[label]
            middles = [
                math.sqrt(first * (last + 1))
                for first, last in zip(numbers(rows, "first"), numbers(rows, "last"), strict=True)
            ]
            null = f"{column}_null" if column in ("sink", "entropy") else None
            draw_line(
                axes, middles, rows, column, style, label=label,
                interval=(f"{column}_low", f"{column}_high"), null=null,
            )  # fmt: skip
            if trained[label] == trained[label]:
                axes.axvline(trained[label], color=style["color"], linewidth=1.0, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("position", fontsize=8)
        bare(axes)
    legend = panels.flat[-1]
    legend.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    legend.legend(handles, labels, frameon=False, fontsize=8, loc="upper left")
    note = "bands: 95 % intervals over texts\ndashed: null\ndotted: length that the model was trained for"
    legend.text(0.02, 0.1, note, fontsize=8, color=INK, transform=legend.transAxes)
