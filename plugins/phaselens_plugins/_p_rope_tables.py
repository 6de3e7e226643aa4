"""Tables and figure of `p-rope`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phaselens.plugin import CAUSAL_TABLES, Column, Table, TableSpec, interval_help
from phaselens_plugins._common import LAYER, interval_columns
from phaselens_plugins._drawing import INK, Record, bare, draw_line, numbers, records_by_model, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = {"low": "lowest", "high": "highest"}
SHARE_OF_HEADS = "share of heads"
PROMPTS = "share of prompts"

_CURVE_COLUMNS = (
    Column("end", str, None, "lowest or highest: the frequencies whose rotation is nulled first"),
    Column("p", float, "share of pairs", "share of the pairs whose rotation is kept"),
    Column(
        "n_nulled", int, "pairs", "pairs of a head whose rotation is nulled, in the layer with the most pairs"
    ),
    Column("ppl", float, "perplexity", "exp of the mean loss over all predicted tokens"),
    Column(
        "ratio", float, "ratio", "perplexity over the unedited model's; exactly 1 where nothing is nulled"
    ),
    *interval_columns("ratio", "ratio_low", "ratio_high"),
    Column("delta_nats", float, "nats/token", "what is added to the loss"),
    Column("delta_low", float, "nats/token", interval_help(paired=True)),
    Column("delta_high", float, "nats/token", interval_help(paired=True)),
    Column(
        "sink_rate",
        float,
        SHARE_OF_HEADS,
        "heads whose score reaches the threshold, mean over layers and texts",
    ),
    *interval_columns(SHARE_OF_HEADS, "sink_low", "sink_high"),
    Column("sink_null", float, SHARE_OF_HEADS, "sink_rate if all attention were uniform"),
    Column("mean_score", float, "share of attention", "sink score, mean over heads, layers and texts"),
    Column("passkey", float, PROMPTS, "prompts in which greedy decoding gives the passkey"),
    Column("passkey_low", float, PROMPTS, "95 % interval, Wilson"),
    Column("passkey_high", float, PROMPTS, "95 % interval, Wilson"),
    Column("passkey_chance", float, PROMPTS, "probability of guessing the passkey"),
    Column("n_prompts", int, "prompts", "prompts with a passkey"),
    Column("n_texts", int, "texts", "texts with a loss"),
)


TABLES = (
    *CAUSAL_TABLES,
    TableSpec(
        "curve", _CURVE_COLUMNS, "one row per end and share; one, of p = 0, for a model without rotation"
    ),
    TableSpec(
        "sinks",
        (
            Column("condition", str, None, "the condition's name; `baseline` is the unedited model"),
            LAYER,
            Column("sink_rate", float, SHARE_OF_HEADS, "heads whose score reaches the threshold"),
            *interval_columns(SHARE_OF_HEADS),
            Column("mean_score", float, "share of attention", "mean over texts and heads"),
        ),
        "one row per condition and layer",
    ),
    TableSpec(
        "passkeys",
        (
            Column("condition", str, None, "the condition's name; `baseline` is the unedited model"),
            Column("length", int, "tokens", "prompt length"),
            Column("exact", float, PROMPTS, "prompts in which greedy decoding gives the passkey"),
            Column("ci_low", float, PROMPTS, "95 % interval, Wilson"),
            Column("ci_high", float, PROMPTS, "95 % interval, Wilson"),
            Column("chance", float, PROMPTS, "probability of guessing the passkey"),
            Column("n", int, "prompts", "prompts of that length"),
        ),
        "one row per condition and length",
    ),
)

_PANELS = (
    ("delta_nats", "delta_low", "delta_high", "Δ loss (nats/token)"),
    ("sink_rate", "sink_low", "sink_high", "sink rate"),
    ("passkey", "passkey_low", "passkey_high", "passkeys retrieved"),
)


def draw_steps(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw loss, sinks and passkeys against p, from 1 to 0: one line per model and end."""
    figure.set_size_inches(10.5, 3.6)
    panels = figure.subplots(1, 3, squeeze=False)[0]
    lines = {
        (label, end): [row for row in rows if row["end"] == end]
        for label, rows in records_by_model(tables["curve"]).items()
        for end in ENDS.values()
    }
    lines = {key: rows for key, rows in lines.items() if rows}
    names = [_line_name(label, end, rows) for (label, end), rows in lines.items()]
    for axes, (column, low, high, title) in zip(panels, _PANELS, strict=True):
        for name, rows, style in zip(names, lines.values(), styles(names).values(), strict=True):
            null = {"sink_rate": "sink_null", "passkey": "passkey_chance"}.get(column)
            shares = numbers(rows, "p")
            draw_line(axes, shares, rows, column, style, label=name, interval=(low, high), null=null)
        axes.set_xlim(1.02, -0.02)
        if column != "delta_nats":
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("p: share of frequencies rotated (1: RoPE, 0: NoPE)", fontsize=8)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        bare(axes)
    panels[0].legend(frameon=False, fontsize=7)


def _line_name(label: str, end: str, rows: Sequence[Record]) -> str:
    """Return the name of a line; that of a model without rotation is a point at p = 0."""
    is_rotated = any(row["n_nulled"] or row["p"] for row in rows)
    return f"{label}, {end} nulled first" if is_rotated else f"{label}, not rotated"
