"""Tables and figure of `temperature`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import CAUSAL_TABLES, Column, Table, TableSpec
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import N_TEXTS, interval_columns
from phaselens_plugins._drawing import INK, Record, bare, draw_line, numbers, records_by_model, styles
from phaselens_plugins._position_bins import BEYOND, FIRST, LAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
            Column(
                "beta",
                float,
                "factor",
                "the β of the sweep with the smallest mean loss; of equals, the nearest to 1",
            ),
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
    """Draw the change of the loss against β, and the best β by position, and by layer if each was edited alone."""
    sweeps, best = records_by_model(tables["sweep"]), records_by_model(tables["best"])
    has_layers = any(row["layer"] is not None for rows in best.values() for row in rows)
    n_panels = 3 if has_layers else 2
    figure.set_size_inches(4.5 * n_panels, 3.6)
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for label, style in styles(list(sweeps)).items():
        rows = [row for row in sweeps[label] if row["layer"] is None]
        betas = numbers(rows, "beta")
        draw_line(
            panels[0], betas, rows, "delta_nats", style, label=label, interval=("delta_low", "delta_high")
        )
        bins = [row for row in best.get(label, []) if row["layer"] is None and row["first"] is not None]
        middles = [
            math.sqrt(first * (last + 1))
            for first, last in zip(numbers(bins, "first"), numbers(bins, "last"), strict=True)
        ]
        _draw_best(panels[1], middles, bins, style)
        for row in records_by_model(tables["summary"]).get(label, []):
            if isinstance(row["n_ctx_trained"], int):
                panels[1].axvline(row["n_ctx_trained"], color=style["color"], linewidth=1.0, linestyle=":")
        if has_layers:
            alone = [row for row in best.get(label, []) if row["layer"] is not None and row["first"] is None]
            _draw_best(panels[2], numbers(alone, "layer"), alone, style)
    panels[0].axvline(1.0, color=INK, linewidth=0.8)
    panels[0].axhline(0.0, color=INK, linewidth=0.8)
    panels[1].set_xscale("log", base=2)
    titles = (
        ("Δ loss (nats/token)", "β"),
        ("best β, all layers at once", "position"),
        ("best β of each layer alone", "layer"),
    )
    for axes, (title, name) in zip(panels, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel(name, fontsize=8)
        bare(axes)
    panels[0].legend(frameon=False, fontsize=8)


def _draw_best(axes: Axes, x: Sequence[float], records: Sequence[Record], style: Mapping[str, Any]) -> None:
    """Draw the best β against `x` with its interval, and a line at 1, the unedited model."""
    axes.axhline(1.0, color=INK, linewidth=0.8)
    draw_line(axes, x, records, "beta", style, interval=("beta_low", "beta_high"))
