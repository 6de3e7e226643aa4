"""Spectra of residual-stream rows, massive rows and coordinates, and the null values of both.

Pure functions of one text's activations without pads: x [pos, d_model], norms [pos]. Values are widened to float64
before they are squared or summed.

Spectra: `spectrum`, `spectra`, `continuity_bound`. Bounds from row 0 alone: `compression_bound`, `require_bound`.
Rows: `row_norms`, `row_cosines`, `median`, `bos_norm`, `massive_rows`, `massive_activations`,
`massive_coordinates`, `balance`.
Distances between rows: `rank_collapse`, `prefix_spread`, `adjacency`, `relative_change`.
Nulls: `random_rows`, `random_spread`, `gaussian_max_ratio`, `gaussian_exceedance`.
"""

from phaselens.spectrum._bound import Bound, compression_bound, require_bound
from phaselens.spectrum._entropy import Spectrum, continuity_bound, spectra, spectrum
from phaselens.spectrum._nulls import NullSpectrum, gaussian_exceedance, gaussian_max_ratio, random_rows
from phaselens.spectrum._rows import (
    Balance,
    BosNormRows,
    MassiveActivationRows,
    balance,
    bos_norm,
    massive_activations,
    massive_coordinates,
    massive_rows,
    median,
    row_cosines,
    row_norms,
)
from phaselens.spectrum._spread import (
    adjacency,
    prefix_spread,
    random_spread,
    rank_collapse,
    relative_change,
)

__all__ = [
    "Balance",
    "BosNormRows",
    "Bound",
    "MassiveActivationRows",
    "NullSpectrum",
    "Spectrum",
    "adjacency",
    "balance",
    "bos_norm",
    "compression_bound",
    "continuity_bound",
    "gaussian_exceedance",
    "gaussian_max_ratio",
    "massive_activations",
    "massive_coordinates",
    "massive_rows",
    "median",
    "prefix_spread",
    "random_rows",
    "random_spread",
    "rank_collapse",
    "relative_change",
    "require_bound",
    "row_cosines",
    "row_norms",
    "spectra",
    "spectrum",
]
