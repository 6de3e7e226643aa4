"""Compression: how few directions the residual stream of a text uses after each layer.

Matrix entropy, anisotropy and effective rank (Queipo-de-Llano et al. 2025, arXiv:2510.06477), of all rows and without
the massive ones; with massive rows in, these numbers mostly say once more how large position 0 is, and the bound that
position 0 alone sets stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Table, TableSpec, hookimpl
from phaselens_plugins._common import (
    FINE,
    N_TEXTS,
    NOT_FINITE,
    SHORT,
    ZERO,
    Grid,
    RowParams,
    Value,
    best,
    cell,
    grid_tables,
    keep,
    nothing,
    overall,
    real_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

NATS = "nats"
NORMALISED = "share of ln min(tokens, d_model)"
RANDOM = "rows of the same norms in random directions"
VALUES = (
    Value("entropy", NATS, "matrix entropy of all rows", RANDOM),
    Value("entropy_normalised", NORMALISED, "entropy over ln min(tokens, d_model)", RANDOM),
    Value("anisotropy", "share of energy", "p₁, the first direction's share", RANDOM),
    Value("effective_rank", "directions", "exp(entropy)", RANDOM),
    Value("entropy_without_massive", NATS, "matrix entropy without massive rows", RANDOM),
    Value("anisotropy_without_massive", "share of energy", "p₁ without massive rows", RANDOM),
    Value("n_massive", "rows", "massive rows, position 0 included"),
    Value("entropy_bound", NATS, "most entropy that position 0 allows; null where it sets no bound"),
    Value("anisotropy_bound", "share of energy", "least p₁ that position 0 allows"),
    Value("entropy_gaussian", NATS, "matrix entropy of Gaussian activations of the same shape"),
    Value(
        "entropy_error",
        NATS,
        "at most this rounding error has `entropy` from Gram matrix and eigenvalues; that of the forward, in the "
        "model's dtype, is not in it",
    ),
)


class Compression(Grid[RowParams]):
    """Matrix entropy, anisotropy and effective rank by text and layer, each with its null and its bound."""

    name = "compression"
    version = "1"
    title = "compression"
    description = "matrix entropy, anisotropy and effective rank of the residual stream"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477"
    Params = RowParams
    tables = (
        *grid_tables(VALUES),
        TableSpec(
            "summary",
            (
                Column("entropy", float, NATS, "mean over texts and layers"),
                Column("entropy_min", float, NATS, "least mean entropy of all layers"),
                Column("entropy_min_layer", int, "index", "the layer that has it: the valley"),
                Column("entropy_without_massive", float, NATS, "mean over texts and layers"),
                Column("anisotropy_max", float, "share of energy", "largest mean p₁ of all layers"),
                Column("anisotropy_max_layer", int, "index", "the layer that has it"),
                N_TEXTS,
            ),
            "a row per model",
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

    @classmethod
    def define(cls, params: RowParams) -> str:
        """Squared singular values, nats, and what is left out."""
        return (
            "entropy −Σ p ln p in nats of p = s² / Σ s², s the singular values of a text's rows after each layer "
            f"(last: before the final norm); w/o mass.: without rows of ≥ {params.massive_factor:g} × the median norm"
        )

    def hooks(self) -> Sequence[str]:
        """The residual stream after each layer."""
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer: LayerView) -> None:
        """Spectra of this layer for the texts of the batch."""
        keep(self, layer, [self._one(x) for x in real_rows(layer, "hook_resid_post")])

    def _one(self, x: Tensor) -> dict[str, float]:
        from phaselens.spectrum import (
            compression_bound,
            massive_rows,
            random_rows,
            require_bound,
            row_norms,
            spectra,
        )

        norms = row_norms(x)
        if len(x) < 2:
            return nothing(VALUES, SHORT)
        if not bool(norms.isfinite().all()):
            return nothing(VALUES, NOT_FINITE)
        if not bool((norms > 0).any()):
            return nothing(VALUES, ZERO)
        massive = massive_rows(norms, self.params.massive_factor)
        found, without = spectra(x, massive)
        bound = compression_bound(x)
        require_bound(found, bound)
        d = x.shape[1]
        all_norms = norms.cpu().numpy()
        null = random_rows(all_norms, d)
        calm = random_rows(norms[~massive].cpu().numpy(), d) if bool(massive.any()) else null
        widest = min(x.shape)
        return {
            "entropy": found.entropy,
            "entropy_null": null.entropy,
            "entropy_normalised": found.entropy_normalised,
            "entropy_normalised_null": null.entropy / math.log(widest) if widest > 1 else math.nan,
            "anisotropy": found.anisotropy,
            "anisotropy_null": null.first,
            "effective_rank": found.effective_rank,
            "effective_rank_null": math.exp(null.entropy),
            "entropy_without_massive": without.entropy,
            "entropy_without_massive_null": calm.entropy,
            "anisotropy_without_massive": without.anisotropy,
            "anisotropy_without_massive_null": calm.first,
            "n_massive": float(massive.sum()),
            "entropy_bound": bound.entropy,
            "anisotropy_bound": bound.anisotropy,
            "entropy_gaussian": _gaussian(len(x), d),
            "entropy_error": found.error,
            "problem": FINE,
        }

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.explain("entropy")
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "summary": self.table("summary", [self._summary()]),
        }

    def _summary(self) -> tuple[Any, ...]:
        entropy, anisotropy = self.mean_by_layer("entropy"), self.mean_by_layer("anisotropy")
        valley, peak = best(-entropy), best(anisotropy)
        return (
            overall(self.values("entropy")),
            None if valley is None else cell(entropy[valley]),
            valley,
            overall(self.values("entropy_without_massive")),
            None if peak is None else cell(anisotropy[peak]),
            peak,
            self.n_texts("entropy"),
        )


@lru_cache(maxsize=4096)
def _gaussian(n_tokens: int, d: int) -> float:
    """Matrix entropy of Gaussian activations: rows in random directions whose norms hardly differ."""
    import numpy as np

    from phaselens.spectrum import random_rows

    return random_rows(np.ones(n_tokens), d).entropy


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [Compression]
