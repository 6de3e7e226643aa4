"""Intervals, p-values and effect sizes whose unit is the text.

Texts are the independent units; tokens, heads, layers and seeds of one text are not. Means over texts with
intervals: `mean_interval`, `paired_interval`. Losses of conditions against their baseline: `compare_conditions`. An arm
against a control drawn with several seeds: `compare_arms`. Many quantities of two models or runs: `compare_paired`.
Accuracies: `wilson_interval`. Orders of items, such as heads: `rank_correlation`. Many p-values of one family:
`adjust_p_values`.
"""

from phaselens.uncertainty._adjustment import ADJUSTMENTS, adjust_p_values
from phaselens.uncertainty._arms import ArmComparison, compare_arms
from phaselens.uncertainty._bootstrap import (
    FEWEST_TEXTS,
    N_RESAMPLES,
    Interval,
    Masked,
    mean_interval,
    paired_interval,
)
from phaselens.uncertainty._losses import LossComparison, compare_conditions
from phaselens.uncertainty._many import PairedComparison, compare_paired
from phaselens.uncertainty._proportions import Proportion, wilson_interval
from phaselens.uncertainty._ranks import RankCorrelation, rank_correlation, spearman

__all__ = [
    "ADJUSTMENTS",
    "FEWEST_TEXTS",
    "N_RESAMPLES",
    "ArmComparison",
    "Interval",
    "LossComparison",
    "Masked",
    "PairedComparison",
    "Proportion",
    "RankCorrelation",
    "adjust_p_values",
    "compare_arms",
    "compare_conditions",
    "compare_paired",
    "mean_interval",
    "paired_interval",
    "rank_correlation",
    "spearman",
    "wilson_interval",
]
