"""Massive activations: single coordinates of the residual stream that are thousands of times the usual size.

Sun et al. 2024 (arXiv:2402.17762), section 2. Small models never meet their criterion, so the continuous ratio
of the largest coordinate to the median is reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from phaselens.plugin import Column, Display, Metric, Params, Table, TableSpec, hookimpl, param
from phaselens_plugins._common import (
    LAYER,
    N_TEXTS,
    TEXT,
    LayerText,
    Numbers,
    TableRow,
    index_of_largest,
    mean_or_none,
    most_frequent,
)
from phaselens_plugins._layer_metric import NO_PROBLEM, NOT_FINITE, SHORT, ZERO, Quantity, layer_tables
from phaselens_plugins._residual import RESIDUAL, TOKEN, TOKEN_ID, TokenListingMetric

QUANTITIES = (
    Quantity("ratio", "ratio", "largest |coordinate| over the median |coordinate|",
             "expected ratio of Gaussian activations of the same shape"),
    Quantity("max_abs", "activation", "largest |coordinate|",
             "expected largest |coordinate| of Gaussian activations with this median"),
    Quantity("median_abs", "activation", "median |coordinate| over all positions and dimensions"),
    Quantity("n_massive", "coordinates", "coordinates that meet Sun et al.'s criterion",
             "expected number for Gaussian activations with this median"),
)  # fmt: skip


@dataclass(frozen=True)
class MassiveParams(Params):
    """Parameters of the metric: the criterion, and the number of coordinates listed."""

    threshold: float = param(100.0, help="a massive coordinate is larger than this", minimum=0)
    ratio: float = param(
        1000.0,
        help="a massive coordinate is at least this many times the median of all coordinates",
        minimum=0,
    )
    top: int = param(3, help="largest coordinates listed for a text and layer", minimum=1, maximum=100)


class TopCoordinate(NamedTuple):
    """A row of the table `top`."""

    text: str
    layer: int
    rank: int
    value: float
    dimension: float
    position: float
    token: str
    token_id: float
    ratio: float | None
    massive: int


class MassiveActivations(TokenListingMetric[MassiveParams]):
    """Metric of the largest coordinates of the residual stream after each layer: value, dimension, token."""

    name = "massive-activations"
    version = "1"
    title = "massive activations"
    description = "largest coordinates of the residual stream: value, dimension, token"
    citation = "Sun et al. 2024, arXiv:2402.17762"
    Params = MassiveParams
    quantities = QUANTITIES
    explained = "ratio"
    tables = (
        *layer_tables(QUANTITIES),
        TableSpec(
            "summary",
            (
                Column("ratio", float, "ratio", "largest mean ratio of all layers"),
                Column("ratio_layer", int, "index", "the layer of the largest mean ratio"),
                Column("first_layer", int, "index", "first layer with a massive coordinate in any text"),
                Column("n_massive", float, "coordinates", "mean over texts and layers"),
                Column(
                    "dimensions", str, None, "dimensions that are massive in any text, most frequent first"
                ),
                N_TEXTS,
            ),
            "one row per model",
        ),
        TableSpec(
            "top",
            (
                TEXT,
                LAYER,
                Column("rank", int, "index", "0 is the largest"),
                Column("value", float, "activation", "with its sign"),
                Column("dimension", int, "index", "of the residual stream"),
                Column("position", int, "index", "of the token"),
                TOKEN,
                TOKEN_ID,
                Column("ratio", float, "ratio", "|value| over the median"),
                Column("massive", int, "0 or 1", "whether it meets the criterion"),
            ),
            "the largest coordinates by text and layer",
        ),
        TableSpec(
            "places",
            (
                LAYER,
                Column("value", float, "activation", "the texts' largest coordinate, mean with signs"),
                Column("dimension", int, "index", "the dimension in which it occurs most often"),
                Column(
                    "dimension_share",
                    float,
                    "share of texts",
                    "texts whose largest coordinate is in `dimension`",
                ),
                Column("position", int, "index", "the position at which it occurs most often"),
                Column(
                    "position_share",
                    float,
                    "share of texts",
                    "texts whose largest coordinate is at `position`",
                ),
                Column("token", str, None, "the token at which it occurs most often"),
                N_TEXTS,
            ),
            "dimension, position and token of the largest coordinate, by layer",
        ),
    )
    display = Display(
        value="ratio",
        title="max / median",
        low="ci_low",
        high="ci_high",
        null="null",
        digits=1,
        strong=1000.0,
        strong_means="1000 times the median or more: massive, if over the threshold too",
        summary=(
            ("ratio_layer", "peak at"),
            ("first_layer", "first massive"),
            ("n_massive", "massive"),
            ("dimensions", "dimensions"),
        ),
    )

    @classmethod
    def define(cls, params: MassiveParams) -> str:
        """State the criterion and the displayed ratio."""
        return (
            f"massive: |a| > {params.threshold:g} and |a| ≥ {params.ratio:g} × the median of all |a| of that layer; "
            "shown: largest |a| / median, after each layer"
        )

    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Measure the largest coordinates: value, dimension, position, token id, each [rank], and their statistics."""
        from phaselens.spectrum import gaussian_exceedance, gaussian_max_ratio, massive_activations

        x, params, missing = text[RESIDUAL], self.params, float("nan")
        largest = massive_activations(x, n=params.top, threshold=params.threshold, ratio=params.ratio)
        has_values = bool(largest.values)
        has_ratio = has_values and largest.median > 0
        token_ids = self.listed_ids(text, largest.positions)
        null_ratio = gaussian_max_ratio(x.numel()) if has_values else missing
        null_count = gaussian_exceedance(x.numel(), largest.median, params.threshold, params.ratio)
        if has_ratio:
            problem = NO_PROBLEM
        elif not text.n_tokens:
            problem = SHORT
        else:
            problem = ZERO if has_values else NOT_FINITE
        padding = [missing] * (params.top - len(largest.values))
        return {
            "ratio": largest.ratio if has_values else missing,
            "ratio_null": null_ratio if has_ratio else missing,
            "max_abs": abs(largest.values[0]) if has_values else missing,
            "max_abs_null": null_ratio * largest.median if has_values else missing,
            "median_abs": largest.median,
            "n_massive": largest.n_massive if has_values else missing,
            "n_massive_null": null_count if has_values else missing,
            "problem": problem,
            "top": [
                [*numbers, *padding]
                for numbers in (largest.values, largest.dimensions, largest.positions, token_ids)
            ],
        }

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        return {
            **super().compute(),
            "top": self.table("top", self._top()),
            "places": self.table("places", self._places()),
        }

    def summary(self) -> TableRow:
        """Return the largest ratio, and where massive coordinates are."""
        import numpy as np

        ratio, n_massive = self.mean_by_layer("ratio"), self.values("n_massive")
        peak_layer = index_of_largest(ratio)
        massive_layers = np.flatnonzero((n_massive > 0).any(0))
        return (
            None if peak_layer is None else ratio[peak_layer],
            peak_layer,
            massive_layers[0] if massive_layers.size else None,
            mean_or_none(n_massive),
            self._massive_dimensions(),
            self.n_texts("ratio"),
        )

    def _massive_dimensions(self) -> str | None:
        import numpy as np

        listed = [int(coordinate.dimension) for coordinate in self._top() if coordinate.massive]
        if not listed:
            return None
        dimensions, counts = np.unique(listed, return_counts=True)
        return ", ".join(str(dimension) for dimension in dimensions[np.argsort(-counts, kind="stable")][:6])

    def _top(self) -> Iterator[TopCoordinate]:
        import numpy as np

        top, medians = self.per_text.stack("top"), self.values("median_abs")
        for text, layer, rank in np.ndindex(*top.shape[:2], top.shape[3]):
            value, dimension, position, token_id = top[text, layer, :, rank]
            if value != value:
                continue
            median = medians[text, layer]
            ratio = abs(value) / median if median > 0 else None
            is_massive = abs(value) > self.params.threshold and abs(value) >= self.params.ratio * median
            token = self.spellings[int(token_id)]
            yield TopCoordinate(
                self.per_text.texts[text],
                layer,
                rank,
                value,
                dimension,
                position,
                token,
                token_id,
                ratio,
                int(is_massive),
            )

    def _places(self) -> Iterator[TableRow]:
        import numpy as np

        largest = self.per_text.stack("top")[..., 0]
        for layer in range(largest.shape[1]):
            present = largest[~np.isnan(largest[:, layer, 0]), layer]
            if not len(present):
                yield layer, None, None, None, None, None, None, 0
                continue
            values, dimensions, positions, token_ids = present.T
            dimension, dimension_share = most_frequent(dimensions)
            position, position_share = most_frequent(positions)
            token = self.spellings[most_frequent(token_ids)[0]]
            yield (
                layer,
                values.mean(),
                dimension,
                dimension_share,
                position,
                position_share,
                token,
                len(present),
            )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [MassiveActivations]
