"""The tables of the metric `sinks`."""

from __future__ import annotations

from phaselens.plugin import Column, TableSpec
from phaselens_plugins._common import HEAD, LAYER, N_TEXTS, N_TOKENS, TEXT, interval_columns

SHARE = "share of attention"
_LEARNED = (
    "on the head's learned sink logit, mean over all queries, without query 0 unless it counts; 0 without one"
)
_LEARNED_NULL = "if the sink logit and all keys that a query sees had the same attention; 0 without one"
SINK_TABLES = (
    TableSpec(
        "texts",
        (
            TEXT,
            LAYER,
            HEAD,
            Column(
                "score",
                float,
                SHARE,
                "mean over the queries that see the key (from it on, within the window), without query 0",
            ),
            Column("score_all", float, SHARE, "score with query 0 included"),
            Column("null", float, SHARE, "score of uniform attention at this text's length and window"),
            Column(
                "null_all",
                float,
                SHARE,
                "score_all of uniform attention at this text's length and window",
            ),
            Column("learned_sink", float, SHARE, _LEARNED),
            Column("learned_sink_null", float, SHARE, _LEARNED_NULL),
            N_TOKENS,
        ),
        "one row per text, layer and head",
    ),
    TableSpec(
        "heads",
        (
            LAYER,
            HEAD,
            Column("score", float, SHARE, "mean over texts"),
            *interval_columns(SHARE),
            Column("null", float, SHARE, "score of uniform attention, mean over texts"),
            Column("learned_sink", float, SHARE, f"{_LEARNED}; mean over texts"),
            *interval_columns(SHARE, "learned_sink_low", "learned_sink_high"),
            Column("learned_sink_null", float, SHARE, f"{_LEARNED_NULL}; mean over texts"),
            N_TEXTS,
        ),
        "one row per layer and head",
    ),
    TableSpec(
        "layers",
        (
            LAYER,
            Column("sink_rate", float, "share of heads", "heads whose score reaches the threshold"),
            *interval_columns("share of heads"),
            Column("null_rate", float, "share of heads", "sink_rate if all attention were uniform"),
            Column("mean_score", float, SHARE, "mean over texts and heads"),
            Column("learned_sink", float, SHARE, f"{_LEARNED}; mean over texts and heads"),
        ),
        "one row per layer",
    ),
    TableSpec(
        "summary",
        (
            Column("sink_rate", float, "share of heads", "mean over layers"),
            Column("mean_score", float, SHARE, "mean over texts, layers and heads"),
            Column("learned_sink", float, SHARE, f"{_LEARNED}; mean over texts, layers and heads"),
            N_TEXTS,
        ),
        "one row per model",
    ),
    TableSpec(
        "positions",
        (
            LAYER,
            HEAD,
            Column("position", int, "index", "the key other than 0 that is most often the strongest"),
            Column("share", float, "share of texts", "texts in which it is the strongest"),
            Column("score", float, SHARE, "score of each text's strongest such key, mean over texts"),
            Column("null", float, SHARE, "score of uniform attention at the same keys, mean over texts"),
            N_TEXTS,
        ),
        "the strongest position other than 0, by layer and head",
    ),
    TableSpec(
        "strongest",
        (
            TEXT,
            LAYER,
            HEAD,
            Column(
                "position",
                int,
                "index",
                "the key other than 0 with the highest score, of those that `min_queries` see",
            ),
            Column(
                "score",
                float,
                SHARE,
                "attention that it receives, mean over the queries that see it, itself included",
            ),
            Column("null", float, SHARE, "score of uniform attention at this key"),
        ),
        "the strongest position other than 0, by text, layer and head",
    ),
)
