"""The tables of `over-mixing`."""

from __future__ import annotations

from phaselens.plugin import Column, TableSpec
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import LAYER, N_TEXTS, N_TOKENS, TEXT, interval_columns
from phaselens_plugins._mixing_sequences import FIRST, MIDDLE, SETTINGS

CHANGE, LATER = "share of norm", "share of tokens"
CHANGE_HELP = "‖x′ − x‖ / ‖x‖ of the tokens after the replaced one, mean over these tokens"
NO_CHANGE = "no later token sees the change; exact for the tokens before it, as the model is causal"
COLLAPSE_HELP = (
    "‖X − 1 x̄ᵀ‖ / ‖X‖ of the unchanged text's residuals, without position 0; 0 if all tokens are alike"
)
COLLAPSE_NULL = "rows of the same norms in random directions: √(1 − 1/n)"
SETTING = Column("setting", str, None, f"how the texts are read: {', '.join(SETTINGS)}")
TOKEN = Column(
    "token", str, None, f"which token is replaced: the {FIRST} one (parameter `token`) or the {MIDDLE} one"
)
NULL = Column("null", float, CHANGE, NO_CHANGE)

MIXING_TABLES = (
    TableSpec(
        "texts",
        (
            TEXT,
            SETTING,
            TOKEN,
            LAYER,
            Column("change", float, CHANGE, f"{CHANGE_HELP}, and over draws"),
            NULL,
            Column(
                "reached", float, LATER, "later tokens whose change is at least `threshold`, mean over draws"
            ),
            Column("own", float, CHANGE, "change of the replaced token itself, mean over draws"),
            Column("n_later", int, "tokens", "tokens after the replaced one"),
        ),
        "one row per text, setting, token and layer",
    ),
    TableSpec(
        "settings",
        (
            SETTING,
            TOKEN,
            LAYER,
            Column("change", float, CHANGE, f"{CHANGE_HELP}, then over texts"),
            *interval_columns(CHANGE),
            NULL,
            Column("difference", float, CHANGE, "change minus that of the same texts as they are"),
            *paired_interval_columns(CHANGE, "difference"),
            Column(
                "reached", float, LATER, "later tokens whose change is at least `threshold`, mean over texts"
            ),
            *interval_columns(LATER, "reached_low", "reached_high"),
            Column("own", float, CHANGE, "change of the replaced token itself, mean over texts"),
            Column(
                "unrelated",
                float,
                CHANGE,
                "the change if each token's residual were that of a random other token of the text, mean over texts",
            ),
            N_TEXTS,
        ),
        "one row per setting, token and layer: means over texts",
    ),
    TableSpec(
        "distances",
        (
            SETTING,
            TOKEN,
            LAYER,
            Column("first", int, "tokens", "smallest distance of the bin, from the replaced token"),
            Column("last", int, "tokens", "largest distance of the bin"),
            Column(
                "change",
                float,
                CHANGE,
                "‖x′ − x‖ / ‖x‖, mean over the bin's tokens, then over texts that reach it",
            ),
            *interval_columns(CHANGE),
            NULL,
            N_TEXTS,
        ),
        "one row per setting, token, layer and bin of distances",
    ),
    TableSpec(
        "collapse",
        (
            SETTING,
            LAYER,
            Column("collapse", float, "ratio", f"{COLLAPSE_HELP}; mean over texts"),
            *interval_columns("ratio"),
            Column("null", float, "ratio", COLLAPSE_NULL),
            Column("collapse_rest", float, "ratio", "collapse without massive rows, mean over texts"),
            *interval_columns("ratio", "collapse_rest_low", "collapse_rest_high"),
            Column("collapse_rest_null", float, "ratio", COLLAPSE_NULL),
            Column("n_massive", float, "tokens", "massive rows other than position 0, mean over texts"),
            N_TEXTS,
        ),
        "one row per setting and layer: rank collapse, means over texts",
    ),
    TableSpec(
        "layers",
        (
            LAYER,
            Column(
                "change",
                float,
                CHANGE,
                f"{CHANGE_HELP}, then over texts; the {FIRST} token, texts as they are",
            ),
            *interval_columns(CHANGE),
            NULL,
            Column(
                "reached", float, LATER, "later tokens whose change is at least `threshold`, mean over texts"
            ),
            Column("no_bos", float, CHANGE, "change in the texts without BOS"),
            *interval_columns(CHANGE, "no_bos_low", "no_bos_high"),
            Column("no_rotation", float, CHANGE, "change with the rotation nulled"),
            *interval_columns(CHANGE, "no_rotation_low", "no_rotation_high"),
            Column("middle", float, CHANGE, f"change by the {MIDDLE} token"),
            Column("middle_no_bos", float, CHANGE, f"change by the {MIDDLE} token in the texts without BOS"),
            Column("collapse", float, "ratio", f"{COLLAPSE_HELP}; mean over texts"),
            *interval_columns("ratio", "collapse_low", "collapse_high"),
            Column("collapse_null", float, "ratio", COLLAPSE_NULL),
            N_TEXTS,
        ),
        "one row per layer: means over texts",
    ),
    TableSpec(
        "summary",
        (
            Column("change", float, CHANGE, "change after the last layer, as in `layers`"),
            Column("no_bos", float, CHANGE, "change after the last layer without BOS"),
            Column("no_rotation", float, CHANGE, "change after the last layer with the rotation nulled"),
            Column("collapse", float, "ratio", "smallest collapse of all layers"),
            Column("collapse_layer", int, "index", "the layer of the smallest collapse"),
            N_TEXTS,
        ),
        "one row per model",
    ),
    TableSpec(
        "replacements",
        (
            TEXT,
            TOKEN,
            Column("draw", int, "index", "the draw of the new token"),
            Column("position", int, "index", "of the replaced token, in the text as the run reads it"),
            Column("old", str, None, "the replaced token"),
            Column("new", str, None, "the token in its place"),
            Column("class", int, "log2", "⌊log₂ n⌋ of the old token's n occurrences in the text"),
            Column("new_class", int, "log2", "that of the new token"),
            N_TOKENS,
        ),
        "the replaced tokens",
    ),
)
