"""Bands of rotary frequencies, and the tables of `rope-frequencies`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from phaselens.plugin import Column, RotatedPairs, TableSpec
from phaselens_plugins._common import LAYER, N_TEXTS, N_TOKENS, TEXT, interval_columns
from phaselens_plugins._layer_metric import Quantity, layer_tables

BANDS = ("low", "middle", "high")
HIGH_PERIOD = 8.0
"""A pair of a shorter period is in the high band."""
SHARE = "share of use"
_MEANING = {
    "low": "that turn less than once in the trained length",
    "middle": "between the other two bands",
    "high": "with a period under 8 positions",
}
QUANTITIES = (
    *(
        Quantity(band, SHARE, f"use of the pairs {_MEANING[band]}: their ‖q‖‖k‖ over the sum over all pairs",
                 "these pairs' share of all pairs")
        for band in BANDS
    ),
    *(
        Quantity(f"score_{band}", "share of |q·k|",
                 f"share of the score that the pairs {_MEANING[band]} make up, in sampled pairs of a query and a key",
                 "these pairs' share of all pairs")
        for band in BANDS
    ),
)  # fmt: skip
PAIR = Column("pair", int, "index", "the rotated pair, in the order of its first dimension")
BAND = Column("band", str, None, "low, middle or high; missing where the frequencies are unknown")

TABLES = (
    *layer_tables(QUANTITIES, heads=True),
    TableSpec(
        "pairs",
        (
            LAYER,
            PAIR,
            Column("low_dimension", int, "index", "first dimension of the pair"),
            Column("high_dimension", int, "index", "second dimension"),
            Column("rotation", str, None, "rotated, or unrotated (nulled, or dropped by DroPE)"),
            Column(
                "angle", float, "radians", "by which one position turns the pair, or would if it were rotated"
            ),
            Column("period", float, "positions", "2π / angle"),
            BAND,
            Column("q_norm", float, "norm", "norm of the queries' pair, mean over tokens, heads and texts"),
            Column("k_norm", float, "norm", "norm of the keys' pair, mean over tokens, heads and texts"),
            Column(
                "use",
                float,
                SHARE,
                "q_norm · k_norm of a head over the sum over pairs, mean over heads and texts",
            ),
            *interval_columns(SHARE),
            Column("null", float, SHARE, "1 over the number of pairs: all used alike"),
            Column(
                "score", float, "share of |q·k|", "mean |q·k| in the pair over the sum over pairs, sampled"
            ),
            *interval_columns("share of |q·k|", "score_low", "score_high"),
            N_TEXTS,
        ),
        "one row per layer and pair: means over heads and texts",
    ),
    TableSpec(
        "massive",
        (
            LAYER,
            Column("tensor", str, None, "q or k, after rotation"),
            BAND,
            Column("n_pairs", int, "pairs", "pairs of the band"),
            Column("cells", float, "cells", "massive cells (head × dimension) in the band, mean over texts"),
            *interval_columns("cells"),
            Column("null", float, "cells", "expected number for Gaussian values"),
            Column("share", float, "share of cells", "of all massive cells in pairs, those of the band"),
            Column("share_null", float, "share of cells", "the band's share of all pairs"),
            N_TEXTS,
        ),
        "massive cells by layer, tensor and band",
    ),
    TableSpec(
        "measured",
        (
            TEXT,
            LAYER,
            PAIR,
            BAND,
            Column("q_norm", float, "norm", "norm of the queries' pair, mean over tokens and heads"),
            Column("k_norm", float, "norm", "norm of the keys' pair, mean over tokens and heads"),
            Column("use", float, SHARE, "q_norm · k_norm of a head over the sum over pairs, mean over heads"),
            Column(
                "score",
                float,
                "share of |q·k|",
                "mean |q·k| in the pair over the sum over pairs, mean over heads",
            ),
            N_TOKENS,
        ),
        "one row per text, layer and pair",
    ),
    TableSpec(
        "summary",
        (
            *(
                Column(band, float, SHARE, f"use of the {band} band, mean over texts, layers and heads")
                for band in BANDS
            ),
            Column("low_null", float, SHARE, "the low band's share of all pairs, mean over layers"),
            Column("rotation", str, None, "rotated, unrotated, or both where layers differ"),
            Column("n_ctx_trained", int, "tokens", "the trained length, which bounds the low band"),
            N_TEXTS,
        ),
        "one row per model",
    ),
)


def band_of(angle: float, n_trained: int | None) -> str:
    """Return the band of a pair that one position turns by `angle` radians.

    >>> [band_of(angle, 512) for angle in (1.0, 0.5, 0.01)]
    ['high', 'middle', 'low']
    """
    period = period_of(angle)
    if n_trained is not None and period > n_trained:
        return "low"
    return "high" if period < HIGH_PERIOD else "middle"


def period_of(angle: float) -> float:
    """Return the number of positions in which a pair turns once."""
    return 2 * math.pi / angle if angle > 0 else math.inf


def bands_of(rotation: RotatedPairs, n_trained: int | None) -> list[str | None]:
    """Return the band of each pair; None where the angles are unknown."""
    if len(rotation.angles) != len(rotation.pairs):
        return [None] * len(rotation.pairs)
    return [band_of(angle, n_trained) for angle in rotation.angles]


def positions_of(names: Sequence[str | None]) -> Iterator[tuple[str, list[int]]]:
    """Yield each band and the indices of its pairs."""
    for band in BANDS:
        yield band, [index for index, name in enumerate(names) if name == band]
