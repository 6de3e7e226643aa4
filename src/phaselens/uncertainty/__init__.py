"""How sure a number over texts is: intervals, p-values and effect sizes whose unit is the text.

Texts are the independent units; tokens, heads, layers and seeds of one text are not. Means over texts with
intervals: `mean_interval`, `paired_interval`. Losses of a condition against its baseline: `compare_losses`,
`compare_conditions`, `perplexity`. An arm against a control drawn by several seeds: `compare_arms`. Accuracies:
`wilson_interval`, `accuracy`.
"""

from phaselens.uncertainty._arms import ArmComparison, compare_arms
from phaselens.uncertainty._bootstrap import (
    FEWEST_TEXTS,
    N_RESAMPLES,
    Interval,
    Masked,
    mean_interval,
    paired_interval,
)
from phaselens.uncertainty._losses import LossComparison, compare_conditions, compare_losses, perplexity
from phaselens.uncertainty._proportions import Accuracy, Proportion, accuracy, wilson_interval

__all__ = [
    "FEWEST_TEXTS",
    "N_RESAMPLES",
    "Accuracy",
    "ArmComparison",
    "Interval",
    "LossComparison",
    "Masked",
    "Proportion",
    "accuracy",
    "compare_arms",
    "compare_conditions",
    "compare_losses",
    "mean_interval",
    "paired_interval",
    "perplexity",
    "wilson_interval",
]
