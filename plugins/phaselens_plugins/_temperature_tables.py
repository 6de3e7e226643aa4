"""Tables and figure of `temperature`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from phaselens.plugin import CAUSAL_TABLES, Column, Table, TableSpec
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import N_TEXTS, interval_columns
from phaselens_plugins._drawing import INK, bare, draw_line, numbers, records_by_model, styles
from phaselens_plugins._position_bins import BEYOND, FIRST, LAST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NATS = "nats/token"
BETA = Column("beta", float, "factor", "the factor of the attention scale; 1 is the unedited model")
LAYER = Column(
    "layer", int, "index", "the layer whose scale is changed, 0-based; missing: all layers at once"
)

TABLES = (
    *CAUSAL_TABLES,
    TableSpec(
        "sweep",
        (
            LAYER,
            BETA,
            Column("ratio", float, "ratio", "perplexity over the unedited model's; exactly 1 at β = 1"),
            *interval_columns("ratio", "ratio_low", "ratio_high"),
            Column("delta_nats", float, NATS, "what is added to the loss"),
            *paired_interval_columns(NATS, "delta"),
            N_TEXTS,
        ),
        "one row per layer (or all) and β",
    ),
    TableSpec(
        "lengths",
        (
            LAYER,
            Column("condition", str, None, "the condition's name; `baseline` is the unedited model"),
            Column("beta", float, "factor", "the factor; missing where it depends on the text's length"),
            FIRST,
            LAST,
            BEYOND,
            Column("loss", float, NATS, "mean loss of the tokens at the bin's positions, mean over texts"),
            Column("delta_nats", float, NATS, "loss minus the unedited model's, mean over texts"),
            *paired_interval_columns(NATS, "delta"),
            N_TEXTS,
        ),
        "loss by position, in bins that double in width",
    ),
    TableSpec(
        "best",
        (
            LAYER,
            Column("first", int, "position", "first position of the bin; missing: all positions"),
            Column("last", int, "position", "last position of the bin"),
            BEYOND,
            Column("beta", float, "factor", "the β of the sweep with the smallest mean loss"),
            *interval_columns("factor", "beta_low", "beta_high"),
            Column(
                "gain",
                float,
                NATS,
                "loss at β = 1 minus that at this β, on the texts that chose it: optimistic",
            ),
            Column(
                "gain_held_out",
                float,
                NATS,
                "the same with each text's β chosen on the other half of the texts; missing with fewer than two",
            ),
            *paired_interval_columns(NATS, "held_out"),
            Column("null", float, NATS, "0: no β of the sweep is better than 1"),
            N_TEXTS,
        ),
        "the best β by layer (or all) and position",
    ),
    TableSpec(
        "summary",
        (
            Column("best_beta", float, "factor", "the best β in all layers at once, over all positions"),
            Column("beta_low", float, "factor", "lower end of its interval"),
            Column("beta_high", float, "factor", "upper end"),
            Column("gain_held_out", float, NATS, "what it gains on texts that did not choose it"),
            Column("n_ctx_trained", int, "tokens", "the length that the model was trained for"),
            N_TEXTS,
        ),
        "one row per model",
    ),
)


def draw_temperature(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw the change of the loss against β, and the best β against the position: one line per model, all layers."""
    figure.set_size_inches(9.0, 3.6)
    left, right = figure.subplots(1, 2, squeeze=False)[0]
    sweeps, best = records_by_model(tables["sweep"]), records_by_model(tables["best"])
    for label, style in styles(list(sweeps)).items():
        rows = [row for row in sweeps[label] if row["layer"] is None]
        betas = numbers(rows, "beta")
        draw_line(left, betas, rows, "delta_nats", style, label=label, interval=("delta_low", "delta_high"))
        bins = [row for row in best.get(label, []) if row["layer"] is None and row["first"] is not None]
        middles = [
            math.sqrt(first * (last + 1))
            for first, last in zip(numbers(bins, "first"), numbers(bins, "last"), strict=True)
        ]
        draw_line(right, middles, bins, "beta", style, interval=("beta_low", "beta_high"))
        for row in records_by_model(tables["summary"]).get(label, []):
            if isinstance(row["n_ctx_trained"], int):
                right.axvline(row["n_ctx_trained"], color=style["color"], linewidth=1.0, linestyle=":")
    left.axvline(1.0, color=INK, linewidth=0.8)
    left.axhline(0.0, color=INK, linewidth=0.8)
    right.axhline(1.0, color=INK, linewidth=0.8)
    right.set_xscale("log", base=2)
    for axes, title, name in ((left, "Δ loss (nats/token)", "β"), (right, "best β", "position")):
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel(name, fontsize=8)
        bare(axes)
    left.legend(frameon=False, fontsize=8)
