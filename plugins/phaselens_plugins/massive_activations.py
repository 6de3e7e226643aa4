"""Massive activations: single coordinates of the residual stream that are thousands of times the usual size.

Sun et al. 2024 (arXiv:2402.17762), section 2. Their criterion never holds in a small model, so the continuous
ratio of the largest coordinate to the median stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Params, Table, TableSpec, hookimpl, param
from phaselens_plugins._common import (
    FINE,
    LAYER,
    N_TEXTS,
    NOT_FINITE,
    SHORT,
    TEXT,
    TOKEN,
    TOKEN_ID,
    ZERO,
    Grid,
    Value,
    best,
    grid_tables,
    keep,
    overall,
    real_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

VALUES = (
    Value("ratio", "ratio", "largest |coordinate| over the median |coordinate|",
          "expected ratio of Gaussian activations of the same shape"),
    Value("max_abs", "activation", "largest |coordinate|",
          "the same for Gaussian activations with this median"),
    Value("median_abs", "activation", "median |coordinate| over all positions and dimensions"),
    Value("n_massive", "coordinates", "coordinates that meet Sun et al.'s criterion",
          "expected number for Gaussian activations with this median"),
)  # fmt: skip


@dataclass(frozen=True)
class MassiveParams(Params):
    """What the metric can be asked for."""

    threshold: float = param(100.0, help="a massive coordinate is larger than this", minimum=0)
    ratio: float = param(1000.0, help="and at least this many times the median of all coordinates", minimum=0)
    top: int = param(3, help="largest coordinates listed for a text and layer", minimum=1, maximum=100)


class MassiveActivations(Grid[MassiveParams]):
    """The largest coordinates of the residual stream after each layer: value, dimension, token."""

    name = "massive-activations"
    version = "1"
    title = "massive activations"
    description = "largest coordinates of the residual stream: value, dimension, token"
    citation = "Sun et al. 2024, arXiv:2402.17762"
    Params = MassiveParams
    tables = (
        *grid_tables(VALUES),
        TableSpec(
            "summary",
            (
                Column("ratio", float, "ratio", "largest mean ratio of all layers"),
                Column("ratio_layer", int, "index", "the layer that has it"),
                Column("first_layer", int, "index", "first layer with a massive coordinate in any text"),
                Column("n_massive", float, "coordinates", "mean over texts and layers"),
                Column(
                    "dimensions", str, None, "dimensions that are massive in any text, most frequent first"
                ),
                N_TEXTS,
            ),
            "a row per model",
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
                Column("dimension", int, "index", "the dimension that most often holds it"),
                Column("dimension_share", float, "share of texts", "texts in which it does"),
                Column("position", int, "index", "the position that most often holds it"),
                Column("position_share", float, "share of texts", "texts in which it does"),
                Column("token", str, None, "the token that most often holds it"),
                N_TEXTS,
            ),
            "where the largest coordinate stands, by layer",
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
        """The criterion and the ratio that is shown."""
        return (
            f"massive: |a| > {params.threshold:g} and |a| ≥ {params.ratio:g} × the median of all |a| of that layer; "
            "shown: largest |a| / median, after each layer"
        )

    def setup(self) -> None:
        """Words of the tokens listed, by id."""
        super().setup()
        self.words: dict[int, str] = {}

    def merge(self, other: Metric[MassiveParams]) -> None:
        """Also the words that `other` met."""
        super().merge(other)
        if isinstance(other, MassiveActivations):
            self.words |= other.words

    def hooks(self) -> Sequence[str]:
        """The residual stream after each layer."""
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer: LayerView) -> None:
        """Largest coordinates of this layer for the texts of the batch."""
        keep(
            self,
            layer,
            [self._one(layer, row, x) for row, x in enumerate(real_rows(layer, "hook_resid_post"))],
        )

    def _one(self, layer: LayerView, row: int, x: Tensor) -> dict[str, Any]:
        from phaselens.spectrum import gaussian_exceedance, gaussian_max_ratio, massive_activations

        params, missing = self.params, float("nan")
        found = massive_activations(x, n=params.top, threshold=params.threshold, ratio=params.ratio)
        known = bool(found.values)
        tokens = layer.batch.tokens[row, found.positions].tolist()
        self.words.update({token: layer.batch.spell(token) for token in tokens if token not in self.words})
        chance = gaussian_max_ratio(x.numel()) if known else missing
        massive = gaussian_exceedance(x.numel(), found.median, params.threshold, params.ratio)
        places: list[list[Any]] = [found.values, found.dimensions, found.positions, tokens]
        usable = known and found.median > 0
        return {
            "ratio": found.ratio if known else missing,
            "ratio_null": chance if usable else missing,
            "max_abs": abs(found.values[0]) if known else missing,
            "max_abs_null": chance * found.median if known else missing,
            "median_abs": found.median,
            "n_massive": found.n_massive if known else missing,
            "n_massive_null": massive if known else missing,
            "problem": FINE if usable else SHORT if not len(x) else ZERO if known else NOT_FINITE,
            "top": [list(each) + [missing] * (params.top - len(each)) for each in places],
        }

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.explain("ratio")
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "summary": self.table("summary", [self._summary()]),
            "top": self.table("top", self._top()),
            "places": self.table("places", self._places()),
        }

    def _summary(self) -> tuple[Any, ...]:
        import numpy as np

        ratio, massive = self.mean_by_layer("ratio"), self.values("n_massive")
        peak = best(ratio)
        with_one = np.flatnonzero((massive > 0).any(0))
        return (
            None if peak is None else ratio[peak],
            peak,
            with_one[0] if with_one.size else None,
            overall(massive),
            self._massive_dimensions(),
            self.n_texts("ratio"),
        )

    def _massive_dimensions(self) -> str | None:
        import numpy as np

        met = [row for row in self._top() if row[-1]]
        if not met:
            return None
        dimensions, counts = np.unique([int(row[4]) for row in met], return_counts=True)
        return ", ".join(str(dimension) for dimension in dimensions[np.argsort(-counts, kind="stable")][:6])

    def _top(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        found, medians = self.per_text.stack("top"), self.values("median_abs")
        for text, layer, rank in np.ndindex(*found.shape[:2], found.shape[3]):
            value, dimension, position, token = found[text, layer, :, rank]
            if value != value:
                continue
            middle = medians[text, layer]
            ratio = abs(value) / middle if middle > 0 else None
            massive = abs(value) > self.params.threshold and abs(value) >= self.params.ratio * middle
            place = self.per_text.texts[text], layer, rank, value, dimension, position
            yield *place, self.words[int(token)], token, ratio, int(massive)

    def _places(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        found = self.per_text.stack("top")[..., 0]
        for layer in range(found.shape[1]):
            there = found[~np.isnan(found[:, layer, 0]), layer]
            if not len(there):
                yield layer, None, None, None, None, None, None, 0
                continue
            value, dimension, position, token = there.T
            (dim, dim_share), (at, at_share), (word, _) = map(_most_frequent, (dimension, position, token))
            yield layer, value.mean(), dim, dim_share, at, at_share, self.words[word], len(there)


def _most_frequent(numbers: Any) -> tuple[int, float]:
    """The number that occurs most often, and its share."""
    import numpy as np

    kinds, counts = np.unique(numbers, return_counts=True)
    return int(kinds[counts.argmax()]), float(counts.max() / counts.sum())


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [MassiveActivations]
