"""The rows of the residual stream: how they fill their space, which of them are massive, and what chance would give.

Pure functions of one text's activations, pads left out: x [pos, d_model], norms [pos]. What is squared or summed is
widened to float64 first.

Spectra: `spectrum`, `spectra`, `continuity_bound`; what row 0 alone guarantees: `compression_bound`, `require_bound`.
Rows: `row_norms`, `median`, `bos_norm`, `massive_rows`, `massive_activations`, `balance`.
Nulls: `random_rows`, `gaussian_max_ratio`, `gaussian_exceedance`.
"""

from phaselens.spectrum._bound import Bound, compression_bound, require_bound
from phaselens.spectrum._entropy import Spectrum, continuity_bound, spectra, spectrum
from phaselens.spectrum._nulls import Chance, gaussian_exceedance, gaussian_max_ratio, random_rows
from phaselens.spectrum._rows import (
    Balance,
    BosNorm,
    MassiveActivations,
    balance,
    bos_norm,
    massive_activations,
    massive_rows,
    median,
    row_norms,
)

__all__ = [
    "Balance",
    "BosNorm",
    "Bound",
    "Chance",
    "MassiveActivations",
    "Spectrum",
    "balance",
    "bos_norm",
    "compression_bound",
    "continuity_bound",
    "gaussian_exceedance",
    "gaussian_max_ratio",
    "massive_activations",
    "massive_rows",
    "median",
    "random_rows",
    "require_bound",
    "row_norms",
    "spectra",
    "spectrum",
]
