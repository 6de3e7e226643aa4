"""The tables of `segments`, and its panels of a figure set."""

from __future__ import annotations

from phaselens.plugin import Column, Display, FigurePanel, FigureSet, TableSpec, interval_help
from phaselens_plugins._common import HEAD, LAYER
from phaselens_plugins._segment_prompts import N_EDGE, SEGMENTS

SHARE, ROWS = "share of attention", "share of queries"
_MEANINGS = {
    "begin": "on position 0",
    "first": f"on the other {N_EDGE - 1} first tokens",
    "needle": "on the sentence with the key",
    "distractors": "on the sentences with other keys",
    "recent": f"on the last {N_EDGE} tokens before the answer",
    "rest": "on all other tokens",
}
_QUERIES = "mean over the last queries before the answer"
UNIFORM = "uniform attention: the segment's share of the keys that a query sees"
RETRIEVAL_HELP = (
    "queries that predict a token of the key, and whose largest weight is on the same token of the needle; of the "
    "queries that see it"
)
RETRIEVAL_NULL = "1 over the number of keys that the query sees"
N_PROMPTS = Column("n_prompts", int, "prompts", "prompts measured")
N_COPIED = Column(
    "n_copied",
    int,
    "prompts",
    "prompts in which a query sees the token that it has to copy, in the answer's spelling",
)


def _interval(unit: str, name: str = "ci") -> tuple[Column, Column]:
    """Return the columns of the two ends of an interval over prompts."""
    help_text = interval_help("prompts")
    return Column(f"{name}_low", float, unit, help_text), Column(f"{name}_high", float, unit, help_text)


def _masses(over: str, names: tuple[str, ...] = SEGMENTS) -> list[Column]:
    """Return a column of each segment's attention, and of its null."""
    columns = []
    for name in names:
        columns.append(Column(name, float, SHARE, f"{_MEANINGS[name]}, {_QUERIES}{over}"))
        columns.append(Column(f"{name}_null", float, SHARE, UNIFORM))
    return columns


_OTHERS = tuple(name for name in SEGMENTS if name != "needle")
_NEEDLE = _MEANINGS["needle"]

SEGMENT_TABLES = (
    TableSpec(
        "prompts",
        (
            Column("prompt", str, None, "length/depth/number"),
            Column("length", int, "tokens", "requested tokens, the answer included"),
            Column("depth", float, "share of filler", "share of the filler that precedes the key"),
            Column("n_tokens", int, "tokens", "tokens of the prompt"),
            Column("key_at", int, "index", "position of the key in the needle"),
            Column(
                "copied", int, "0 or 1", "whether the key has the same tokens in the needle and in the answer"
            ),
            *(Column(f"n_{name}", int, "tokens", f"tokens {_MEANINGS[name][3:]}") for name in SEGMENTS),
        ),
        "one row per prompt",
    ),
    TableSpec(
        "heads",
        (
            LAYER,
            HEAD,
            Column("needle", float, SHARE, f"{_NEEDLE}, {_QUERIES} and prompts"),
            *_interval(SHARE),
            Column("null", float, SHARE, UNIFORM),
            *_masses(" and prompts", _OTHERS),
            Column("retrieval", float, ROWS, f"{RETRIEVAL_HELP}; mean over prompts"),
            *_interval(ROWS, "retrieval"),
            Column("retrieval_null", float, ROWS, RETRIEVAL_NULL),
            Column("ties", float, ROWS, "of these queries, those whose largest weight several keys share"),
            N_PROMPTS,
            N_COPIED,
        ),
        "one row per layer and head",
    ),
    TableSpec(
        "layers",
        (
            LAYER,
            Column("needle", float, SHARE, f"{_NEEDLE}, {_QUERIES}, heads and prompts"),
            *_interval(SHARE),
            Column("null", float, SHARE, UNIFORM),
            *_masses(", heads and prompts", _OTHERS),
            Column("retrieval", float, ROWS, "retrieval of the head that has the largest"),
            *_interval(ROWS, "retrieval"),
            Column("retrieval_head", int, "index", "that head"),
            Column("retrieval_null", float, ROWS, RETRIEVAL_NULL),
            N_PROMPTS,
        ),
        "one row per layer: means over heads",
    ),
    TableSpec(
        "cells",
        (
            Column("length", int, "tokens", "requested tokens of the prompts"),
            Column("depth", float, "share of filler", "share of the filler that precedes the key"),
            LAYER,
            Column("needle", float, SHARE, f"{_NEEDLE}, {_QUERIES}, heads and prompts"),
            *_interval(SHARE),
            Column("null", float, SHARE, UNIFORM),
            *_masses(", heads and prompts", _OTHERS),
            Column("retrieval", float, ROWS, "retrieval of the layer's `retrieval_head` in these prompts"),
            *_interval(ROWS, "retrieval"),
            Column("retrieval_head", int, "index", "the head that has the largest over all prompts"),
            Column("retrieval_null", float, ROWS, RETRIEVAL_NULL),
            N_PROMPTS,
        ),
        "one row per length, depth and layer",
    ),
    TableSpec(
        "lengths",
        (
            LAYER,
            HEAD,
            Column("length", int, "tokens", "requested tokens of the prompts"),
            Column("needle", float, SHARE, f"{_NEEDLE}, {_QUERIES} and prompts"),
            *_interval(SHARE),
            Column("null", float, SHARE, UNIFORM),
            Column("retrieval", float, ROWS, f"{RETRIEVAL_HELP}; mean over prompts"),
            *_interval(ROWS, "retrieval"),
            Column("retrieval_null", float, ROWS, RETRIEVAL_NULL),
            N_PROMPTS,
            N_COPIED,
        ),
        "one row per layer, head and length",
    ),
    TableSpec(
        "summary",
        (
            Column("retrieval", float, ROWS, "largest retrieval score of all heads"),
            Column("retrieval_layer", int, "index", "the layer of that head"),
            Column("retrieval_head", int, "index", "the head"),
            Column("retrieval_null", float, ROWS, RETRIEVAL_NULL),
            Column(
                "retrieval_heads", float, "share of heads", "heads whose retrieval is at least `threshold`"
            ),
            Column("needle", float, SHARE, "largest mean attention on the needle of all layers"),
            Column("needle_layer", int, "index", "that layer"),
            N_PROMPTS,
        ),
        "one row per model",
    ),
)

_FIGURES = FigureSet("segments", ("needle", "begin", "recent", "distractors", "retrieval"))


def _panel(name: str, title: str) -> FigurePanel:
    return FigurePanel(_FIGURES, name, Display(name, title, null=f"{name}_null"))


SEGMENT_PANELS = (
    FigurePanel(
        _FIGURES,
        "needle",
        Display("needle", "attention on the needle", low="ci_low", high="ci_high", null="null"),
    ),
    _panel("begin", "attention on position 0"),
    _panel("recent", f"attention on the last {N_EDGE} tokens"),
    _panel("distractors", "attention on other keys"),
    FigurePanel(
        _FIGURES,
        "retrieval",
        Display(
            "retrieval",
            "largest retrieval score",
            low="retrieval_low",
            high="retrieval_high",
            null="retrieval_null",
        ),
    ),
)
