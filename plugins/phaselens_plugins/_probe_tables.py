"""The tables of `position-probe`, and its panels of the figure set on position."""

from __future__ import annotations

from phaselens.plugin import Column, Display, FigurePanel, FigureSet, TableSpec
from phaselens_plugins._common import LAYER, N_TEXTS, N_TOKENS, TEXT, interval_columns
from phaselens_plugins._probe_rows import TARGETS

R2 = "share of variance"
PAIRS = "share of pairs"
R2_HELP = {
    "r2": "1 − Σ(y − ŷ)² / Σ(y − ȳ)² of y = t / T in texts that the probe was not fitted on; ȳ is the mean in those "
    "that it was fitted on",
    "r2_log": "r2 of y = ln(1 + t)",
}
R2_NULL = "r2 with the positions permuted within each text, fitted and tested anew, mean over permutations"
ADJACENCY_HELP = (
    "tokens whose residual has a greater cosine with the next token's than with a random other token's"
)
SPREAD_HELP = "‖X − 1 x̄ᵀ‖ / ‖X‖ of the tokens up to t, without position 0; mean over t"
ADJACENCY_NULL, SPREAD_NULL = "tokens in random order", "rows of the same norms in random directions"

PROBE_TABLES = (
    TableSpec(
        "texts",
        (
            TEXT,
            LAYER,
            Column("r2", float, R2, R2_HELP["r2"]),
            Column("null", float, R2, R2_NULL),
            Column("r2_log", float, R2, R2_HELP["r2_log"]),
            Column("r2_log_null", float, R2, R2_NULL),
            Column("adjacency", float, PAIRS, ADJACENCY_HELP),
            Column("adjacency_null", float, PAIRS, ADJACENCY_NULL),
            Column("prefix_spread", float, "ratio", SPREAD_HELP),
            Column("prefix_spread_null", float, "ratio", SPREAD_NULL),
            Column("n_rows", int, "tokens", "tokens that the probe predicts"),
            N_TOKENS,
        ),
        "one row per text and layer",
    ),
    TableSpec(
        "layers",
        (
            LAYER,
            Column("r2", float, R2, f"{R2_HELP['r2']}; sums over all texts"),
            *interval_columns(R2),
            Column("null", float, R2, R2_NULL),
            Column("r2_log", float, R2, f"{R2_HELP['r2_log']}; sums over all texts"),
            *interval_columns(R2, "r2_log_low", "r2_log_high"),
            Column("r2_log_null", float, R2, R2_NULL),
            Column("adjacency", float, PAIRS, ADJACENCY_HELP),
            *interval_columns(PAIRS, "adjacency_low", "adjacency_high"),
            Column("adjacency_null", float, PAIRS, ADJACENCY_NULL),
            Column("prefix_spread", float, "ratio", SPREAD_HELP),
            *interval_columns("ratio", "prefix_spread_low", "prefix_spread_high"),
            Column("prefix_spread_null", float, "ratio", SPREAD_NULL),
            N_TEXTS,
        ),
        "one row per layer: R² of all texts, the others as means over texts",
    ),
    TableSpec(
        "summary",
        (
            Column("r2", float, R2, "largest r2 of all layers"),
            Column("r2_layer", int, "index", "the layer of the largest r2"),
            Column("r2_log", float, R2, "largest r2_log of all layers"),
            Column("r2_log_layer", int, "index", "the layer of the largest r2_log"),
            Column("r2_embedding", float, R2, "r2 before layer 0"),
            Column("r2_log_embedding", float, R2, "r2_log before layer 0"),
            Column("adjacency_embedding", float, PAIRS, "adjacency before layer 0, mean over texts"),
            N_TEXTS,
        ),
        "one row per model",
    ),
    TableSpec(
        "probes",
        (
            LAYER,
            Column("target", str, None, f"what is predicted: {TARGETS[0]} or {TARGETS[1]}"),
            Column("fold", int, "index", "the fold of texts that is predicted"),
            Column(
                "penalty",
                float,
                "ratio",
                "penalty of the squared coefficients, over the mean squared norm of the centred rows",
            ),
            Column("n_fitted", int, "tokens", "tokens of the other folds, on which the probe is fitted"),
            Column("n_tested", int, "tokens", "tokens of the fold"),
        ),
        "the fitted probes, by layer, target and fold; layer −1 is the residual stream before layer 0",
    ),
)

FIGURES = FigureSet("position", ("probe", "probe-log", "adjacency", "prefix-spread"))
PROBE_PANELS = (
    FigurePanel(
        FIGURES, "probe", Display("r2", "R² of t / T", low="ci_low", high="ci_high", null="null")
    ),
    FigurePanel(
        FIGURES,
        "probe-log",
        Display(
            "r2_log", "R² of ln(1 + t)", low="r2_log_low", high="r2_log_high", null="r2_log_null"
        ),
    ),
    FigurePanel(
        FIGURES,
        "adjacency",
        Display(
            "adjacency", "adjacency", low="adjacency_low", high="adjacency_high", null="adjacency_null"
        ),
    ),
    FigurePanel(
        FIGURES,
        "prefix-spread",
        Display(
            "prefix_spread", "prefix spread",
            low="prefix_spread_low", high="prefix_spread_high", null="prefix_spread_null",
        ),
    ),
)  # fmt: skip
