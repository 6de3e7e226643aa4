"""Compression: the number of directions that the residual stream of a text uses after each layer.

Matrix entropy, anisotropy and effective rank (Queipo-de-Llano et al. 2025, arXiv:2510.06477), of all rows and of those
that are not massive. With massive rows, these numbers mainly restate how large position 0 is; the bounds that position
0 alone sets are reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from phaselens.plugin import Column, Display, FigurePanel, Metric, TableSpec, hookimpl
from phaselens_plugins._common import (
    N_TEXTS,
    STUDY,
    LayerText,
    Numbers,
    TableRow,
    index_of_largest,
    mean_or_none,
    none_if_nan,
)
from phaselens_plugins._layer_metric import (
    NO_PROBLEM,
    NOT_FINITE,
    SHORT,
    ZERO,
    Quantity,
    layer_tables,
    missing_record,
)
from phaselens_plugins._residual import RESIDUAL, ResidualMetric, RowParams

NATS = "nats"
NORMALISED = "share of ln min(tokens, d_model)"
RANDOM = "rows of the same norms in random directions"
QUANTITIES = (
    Quantity("entropy", NATS, "matrix entropy of all rows", RANDOM),
    Quantity("entropy_normalised", NORMALISED, "entropy over ln min(tokens, d_model)", RANDOM),
    Quantity("anisotropy", "share of energy", "p₁, the first direction's share", RANDOM),
    Quantity("effective_rank", "directions", "exp(entropy)", RANDOM),
    Quantity("entropy_without_massive", NATS, "matrix entropy without massive rows", RANDOM),
    Quantity("anisotropy_without_massive", "share of energy", "p₁ without massive rows", RANDOM),
    Quantity("n_massive", "rows", "massive rows, position 0 included"),
    Quantity("entropy_bound", NATS, "most entropy that position 0 allows; missing where it sets no bound"),
    Quantity("anisotropy_bound", "share of energy", "least p₁ that position 0 allows"),
    Quantity("entropy_gaussian", NATS, "matrix entropy of Gaussian activations of the same shape"),
    Quantity(
        "entropy_error",
        NATS,
        "bound on the rounding error of `entropy` from Gram matrix and eigenvalues; that of the forward, in the "
        "model's dtype, is not included",
    ),
)


class Compression(ResidualMetric[RowParams]):
    """Metric of matrix entropy, anisotropy and effective rank by text and layer, with nulls and bounds."""

    name = "compression"
    version = "1"
    title = "compression"
    description = "matrix entropy, anisotropy and effective rank of the residual stream"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477"
    Params = RowParams
    quantities = QUANTITIES
    explained = "entropy"
    tables = (
        *layer_tables(QUANTITIES),
        TableSpec(
            "summary",
            (
                Column("entropy", float, NATS, "mean over texts and layers"),
                Column("entropy_min", float, NATS, "smallest mean entropy of all layers"),
                Column("entropy_min_layer", int, "index", "the layer of the lowest entropy: the valley"),
                Column("entropy_without_massive", float, NATS, "mean over texts and layers"),
                Column("anisotropy_max", float, "share of energy", "largest mean p₁ of all layers"),
                Column("anisotropy_max_layer", int, "index", "the layer of the highest anisotropy"),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="entropy",
        title="entropy",
        low="ci_low",
        high="ci_high",
        null="null",
        also=(("entropy_without_massive", "w/o mass."),),
        summary=(
            ("entropy_min", "valley"),
            ("entropy_min_layer", "at"),
            ("entropy_without_massive", "w/o massive"),
            ("anisotropy_max", "max p₁"),
            ("anisotropy_max_layer", "at"),
        ),
    )

    figure_panels = (
        FigurePanel(
            STUDY, "entropy", Display("entropy", "matrix entropy", low="ci_low", high="ci_high", null="null")
        ),
        FigurePanel(
            STUDY,
            "anisotropy",
            Display(
                "anisotropy",
                "anisotropy p₁",
                low="anisotropy_low",
                high="anisotropy_high",
                null="anisotropy_null",
                percent=True,
            ),
            summary_only=True,
        ),
    )

    @classmethod
    def define(cls, params: RowParams) -> str:
        """State the formula, its unit, and which rows `w/o mass.` leaves out."""
        return (
            "entropy −Σ p ln p in nats of p = s² / Σ s², s the singular values of a text's rows after each layer "
            f"(last: before the final norm); w/o mass.: without rows of ≥ {params.massive_factor:g} × the median norm"
        )

    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Measure the spectra of all rows and of those that are not massive, with their nulls and bounds."""
        from phaselens.spectrum import (
            compression_bound,
            massive_rows,
            random_rows,
            require_bound,
            row_norms,
            spectra,
        )

        x = text[RESIDUAL]
        norms = row_norms(x)
        if text.n_tokens < 2:
            return missing_record(QUANTITIES, SHORT)
        if not bool(norms.isfinite().all()):
            return missing_record(QUANTITIES, NOT_FINITE)
        if not bool((norms > 0).any()):
            return missing_record(QUANTITIES, ZERO)
        is_massive = massive_rows(norms, self.params.massive_factor)
        spectrum, spectrum_without_massive = spectra(x, is_massive)
        bound = compression_bound(x)
        require_bound(spectrum, bound)
        n_tokens, d_model = x.shape
        null = random_rows(norms.cpu().numpy(), d_model)
        null_without_massive = (
            random_rows(norms[~is_massive].cpu().numpy(), d_model) if bool(is_massive.any()) else null
        )
        rank = min(n_tokens, d_model)
        return {
            "entropy": spectrum.entropy,
            "entropy_null": null.entropy,
            "entropy_normalised": spectrum.entropy_normalised,
            "entropy_normalised_null": null.entropy / math.log(rank) if rank > 1 else math.nan,
            "anisotropy": spectrum.anisotropy,
            "anisotropy_null": null.anisotropy,
            "effective_rank": spectrum.effective_rank,
            "effective_rank_null": math.exp(null.entropy),
            "entropy_without_massive": spectrum_without_massive.entropy,
            "entropy_without_massive_null": null_without_massive.entropy,
            "anisotropy_without_massive": spectrum_without_massive.anisotropy,
            "anisotropy_without_massive_null": null_without_massive.anisotropy,
            "n_massive": float(is_massive.sum()),
            "entropy_bound": bound.entropy,
            "anisotropy_bound": bound.anisotropy,
            "entropy_gaussian": _gaussian_entropy(n_tokens, d_model),
            "entropy_error": spectrum.error,
            "problem": NO_PROBLEM,
        }

    def summary(self) -> TableRow:
        """Return the mean entropies, the valley and the peak of anisotropy."""
        entropy, anisotropy = self.mean_by_layer("entropy"), self.mean_by_layer("anisotropy")
        valley_layer, peak_layer = index_of_largest(-entropy), index_of_largest(anisotropy)
        return (
            mean_or_none(self.values("entropy")),
            None if valley_layer is None else none_if_nan(entropy[valley_layer]),
            valley_layer,
            mean_or_none(self.values("entropy_without_massive")),
            None if peak_layer is None else none_if_nan(anisotropy[peak_layer]),
            peak_layer,
            self.n_texts("entropy"),
        )


@lru_cache(maxsize=4096)
def _gaussian_entropy(n_tokens: int, d_model: int) -> float:
    """Return the matrix entropy of Gaussian activations: rows in random directions whose norms hardly differ."""
    import numpy as np

    from phaselens.spectrum import random_rows

    return random_rows(np.ones(n_tokens), d_model).entropy


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Compression]
