"""Massive values in queries, keys and values: the cells (head × dimension) of a layer that are far above the mean.

Jin et al. 2025 (arXiv:2502.01563). Two means are in use, over all cells of a tensor and over each head's cells, and
some authors count before the rotation, which mixes dimensions. The tables have every combination.

Only the norm of a pair of dimensions that the rotation mixes is the same before and after it. The pairs are those of
the model's own rotation (`ModelInfo.rotations`), whether that is applied, nulled or dropped; unrotated
dimensions belong to no pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    Column,
    Display,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._common import (
    LAYER,
    N_TEXTS,
    N_TOKENS,
    TEXT,
    Numbers,
    TableRow,
    interval_columns,
    layer_texts,
    mean_intervals,
    none_if_nan,
    null_means,
    quoted_ids,
    rows_by_index,
    store_by_text,
)
from phaselens_plugins._layer_metric import NO_PROBLEM, NOT_FINITE, SHORT, ZERO, LayerMetric
from phaselens_plugins._rotated_parts import PARTS_TABLE, measure_parts, part_rows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import RotatedPairs

#: Tensors by the name they have in the tables: after the rotation, and before it (and before norms of q and k).
POINTS = {
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "q_pre": "attn.hook_q",
    "k_pre": "attn.hook_k",
}
DEFINITIONS = ("global", "per_head", "pairs")
#: Numbers stored for each tensor of a text, in this order.
STORED = ("global", "per_head", "max_ratio", "null", "pairs", "null_pairs", "n_cells")
CELLS = "cells"
PAIRS = "pairs"
SHARE = "share of cells"
TENSOR = Column(
    "tensor", str, None, "q, k, v after rotation; q_pre, k_pre as projected, before norms and rotation"
)


@dataclass(frozen=True)
class ValueParams(Params):
    """Parameters of the metric: the threshold, and the mean it is relative to."""

    multiple: float = param(5.0, help="a cell is massive above this many times the mean cell", minimum=0)
    mean: str = param(
        "global",
        help="the mean of the layers table: over all cells of a tensor, or over each head's",
        choices=("global", "per_head"),
    )


def _columns_by_tensor() -> Iterator[Column]:
    for index, tensor in enumerate(POINTS):
        stage = (
            "after rotation" if tensor in ("q", "k") else "before rotation" if "pre" in tensor else "values"
        )
        low, high, null = (
            (f"{tensor}_low", f"{tensor}_high", f"{tensor}_null") if index else ("ci_low", "ci_high", "null")
        )
        yield Column(tensor, float, CELLS, f"massive cells of {tensor[0]}, {stage}, mean over texts")
        yield from interval_columns(CELLS, low, high)
        yield Column(null, float, CELLS, "expected number for Gaussian values")
        yield Column(f"{tensor}_fraction", float, SHARE, "massive cells as a share of the tensor's cells")


class MassiveValues(LayerMetric[ValueParams]):
    """Metric of the massive cells of queries, keys and values, by text and layer."""

    name = "massive-values"
    version = "2"
    title = "massive values in Q, K, V"
    description = "cells of queries, keys and values whose norm is far above the mean"
    citation = "Jin et al. 2025, arXiv:2502.01563"
    Params = ValueParams
    tables = (
        TableSpec(
            "texts",
            (
                TEXT,
                LAYER,
                TENSOR,
                Column("n_cells", int, CELLS, "heads × dimensions"),
                Column("count_global", float, CELLS, "massive cells, against the mean of all cells"),
                Column("fraction_global", float, SHARE, "count_global as a share of the cells"),
                Column("count_per_head", float, CELLS, "massive cells, against the mean of their head"),
                Column("fraction_per_head", float, SHARE, "count_per_head as a share of the cells"),
                Column(
                    "count_pairs",
                    float,
                    PAIRS,
                    "massive pairs of dimensions that the rotation mixes, against the mean of all; missing without "
                    "pairs",
                ),
                Column("fraction_pairs", float, "share of pairs", "count_pairs as a share of the pairs"),
                Column("max_ratio", float, "ratio", "largest cell / mean of all cells"),
                Column("null", float, CELLS, "expected count_global for Gaussian values"),
                Column("null_pairs", float, PAIRS, "expected count_pairs for Gaussian values"),
                N_TOKENS,
            ),
            "one row per text, layer and tensor",
        ),
        TableSpec("layers", (LAYER, *_columns_by_tensor()), "one row per layer, by the chosen mean"),
        TableSpec(
            "definitions",
            (
                LAYER,
                TENSOR,
                Column(
                    "definition",
                    str,
                    None,
                    "mean over all cells (global), over a head's (per_head), or pairs",
                ),
                Column(
                    "count", float, CELLS, "mean over texts; for pairs, this and null are numbers of pairs"
                ),
                *interval_columns(CELLS),
                Column("null", float, CELLS, "expected number for Gaussian values"),
                Column("fraction", float, SHARE, "mean over texts"),
                N_TEXTS,
            ),
            "every definition, by layer and tensor",
        ),
        PARTS_TABLE,
        TableSpec(
            "summary",
            (
                *(
                    Column(f"{tensor}_{statistic}", float, unit, help_)
                    for tensor in POINTS
                    for statistic, unit, help_ in (
                        ("total", CELLS, "sum over layers of the mean over texts"),
                        ("fraction", SHARE, "mean over layers"),
                    )
                ),
                N_TEXTS,
            ),
            "one row per model, by the chosen mean",
        ),
    )
    display = Display(
        value="q",
        title="Q",
        low="ci_low",
        high="ci_high",
        null="null",
        digits=1,
        also=(("k", "K"), ("v", "V")),
        summary=(("q_total", "Q total"), ("k_total", "K total"), ("v_total", "V total")),
    )

    @classmethod
    def define(cls, params: ValueParams) -> str:
        """State which mean is used and that queries and keys are shown after rotation."""
        mean_of = {"global": "all cells of the tensor", "per_head": "the cells of its head"}[params.mean]
        return (
            f"cells (head × dimension) whose norm over the text exceeds {params.multiple:g} × the mean of {mean_of}; "
            "queries and keys after rotation"
        )

    partial_layers = True  # a tensor whose point a layer lacks is missing there, the others are measured

    def hooks(self) -> Sequence[str]:
        """Return the points of queries and keys on both sides of the rotation, and of values."""
        return [in_layer("{layer}", point) for point in POINTS.values()]

    def update(self, layer: LayerView) -> None:
        """Count massive cells of this layer for the texts of the batch."""
        if POINTS["q"] not in layer:
            return
        pairs = self._pairs(layer.index or 0)
        texts = layer_texts(layer)
        states = [
            {tensor: text[point] for tensor, point in POINTS.items() if point in layer} for text in texts
        ]
        store_by_text(self, layer, [self._measure(tensors, pairs) for tensors in states])

    def _measure(self, tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]) -> dict[str, Numbers]:
        """Count the massive cells of one text, from its tensors [pos, head, d_head]."""
        from phaselens.attention import gaussian_massive_share, massive_cells, norm_matrix, pair_norms

        multiple, missing = self.params.multiple, float("nan")
        n_tokens = len(tensors["q"])
        record: dict[str, Numbers] = {"problem": NO_PROBLEM}
        for tensor in POINTS:
            if tensor not in tensors:
                record[tensor] = [missing] * len(STORED)
                continue
            norms = norm_matrix(tensors[tensor])
            if tensor in ("q", "k"):
                record[f"{tensor}.parts"] = measure_parts(norms, pairs, multiple)
            is_finite = bool(norms.isfinite().all())
            if not is_finite or not bool((norms > 0).any()):
                record["problem"] = SHORT if not n_tokens else ZERO if is_finite else NOT_FINITE
                record[tensor] = [*[missing] * (len(STORED) - 1), float(norms.numel())]
                continue
            counts = [float(massive_cells(norms, multiple, mean).sum()) for mean in ("global", "per_head")]
            null = norms.numel() * gaussian_massive_share(n_tokens, multiple)
            pair_counts = [missing] * 2
            if tensor != "v" and pairs:
                norms_of_pairs = pair_norms(norms, pairs)
                if bool((norms_of_pairs > 0).any()):
                    null_pairs = norms_of_pairs.numel() * gaussian_massive_share(2 * n_tokens, multiple)
                    pair_counts = [float(massive_cells(norms_of_pairs, multiple).sum()), null_pairs]
            max_ratio = float(norms.max() / norms.mean())
            record[tensor] = [*counts, max_ratio, null, *pair_counts, float(norms.numel())]
        return record

    def _pairs(self, layer: int) -> tuple[tuple[int, int], ...]:
        """Return the dimensions of a head that this layer's rotation mixes."""
        rotation = self._rotation(layer)
        return rotation.pairs if rotation is not None else ()

    def _rotation(self, layer: int) -> RotatedPairs | None:
        return self.model.rotations[layer] if self.model.rotations else None

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.explain("count")
        for tensor in POINTS:
            numbers = self.per_text.stack(tensor)
            for index, name in enumerate(STORED):
                self.derived[f"{tensor}.{name}"] = numbers[..., index]
        self._explain_pairs()
        return {
            "texts": self.table("texts", self._texts()),
            "layers": self.table("layers", self._layers()),
            "definitions": self.table("definitions", self._definitions()),
            "parts": self.table(
                "parts", part_rows(self, list(map(self._rotation, range(self.model.n_layers))), self._n_cells)
            ),
            "summary": self.table("summary", [self._summary()]),
        }

    def _n_cells(self, tensor: str) -> np.ndarray:
        """Return heads × dimensions of a tensor, [layer]; NaN in a layer that lacks it."""
        import numpy as np

        n_cells = self.values(f"{tensor}.n_cells")
        return np.array([max(column[~np.isnan(column)], default=np.nan) for column in n_cells.T])

    def _explain_pairs(self) -> None:
        """Warn of the layers without pairs, with the reason."""
        import numpy as np

        reasons: dict[str, list[str]] = {}
        for layer, encoding in enumerate(self.model.positions):
            rotation = self._rotation(layer)
            if layer not in self.model.attention_layers or (rotation is not None and rotation.pairs):
                continue
            if rotation is not None:
                reason = f"the rotation could not be read: {rotation.problem}"
            elif "rope" in encoding:
                reason = "which dimensions the rotation mixes is unknown"
            else:
                reason = "queries and keys are not rotated there, so no pairs are mixed"
            reasons.setdefault(reason, []).append(str(layer))
        for reason, layers in reasons.items():
            self.warn(f"count_pairs is missing in layer {', '.join(layers)}: {reason}")
        for tensor in POINTS:
            has_pairs = ~np.isnan(self._n_pairs(tensor))
            is_zero = (
                np.isnan(self.values(f"{tensor}.pairs"))
                & ~np.isnan(self.values(f"{tensor}.global"))
                & has_pairs
            )
            if tensor != "v" and is_zero.any():
                zero_layers = ", ".join(map(str, np.flatnonzero(is_zero.any(0))))
                ids = quoted_ids(self.per_text.texts, is_zero.any(1))
                self.warn(
                    f"count_pairs of {tensor} is missing in layer {zero_layers} for text {ids}: the dimensions that "
                    "the rotation mixes are all zero"
                )

    def _n_pairs(self, tensor: str) -> np.ndarray:
        """Return the number of pairs in all heads, [layer]; NaN where there are none."""
        import numpy as np

        n_cells = self._n_cells(tensor)
        n_pairs = np.full(len(n_cells), np.nan)
        for layer in range(len(n_cells)):
            rotation = self._rotation(layer)
            if rotation is not None and rotation.pairs:
                n_pairs[layer] = n_cells[layer] // rotation.d_head * len(rotation.pairs)
        return n_pairs

    def _texts(self) -> Iterator[TableRow]:
        import numpy as np

        text_ids, lengths = self.per_text.texts, self.per_text.lengths
        n_pairs = {tensor: self._n_pairs(tensor) for tensor in POINTS if tensor != "v"}
        for text, layer in np.ndindex(self.values("q.global").shape):
            for tensor in POINTS:
                n_cells = self._n_cells(tensor)[layer]
                count, count_per_head, count_pairs, max_ratio, null, null_pairs = (
                    float(self.values(f"{tensor}.{name}")[text, layer])
                    for name in ("global", "per_head", "pairs", "max_ratio", "null", "null_pairs")
                )
                numbers = (
                    count,
                    count / n_cells,
                    count_per_head,
                    count_per_head / n_cells,
                    count_pairs,
                    count_pairs / n_pairs[tensor][layer] if tensor in n_pairs else count_pairs,
                    max_ratio,
                    null,
                    null_pairs,
                )
                size = None if np.isnan(n_cells) else int(n_cells)
                yield text_ids[text], layer, tensor, size, *map(none_if_nan, numbers), lengths[text]

    def _layers(self) -> Iterator[TableRow]:
        columns: list[Sequence[float | None]] = []
        for tensor in POINTS:
            means, lows, highs = mean_intervals(self, self.values(f"{tensor}.{self.params.mean}"))
            nulls = null_means(self, self.values(f"{tensor}.null"))
            n_cells = self._n_cells(tensor)
            fractions = [
                None if mean is None else mean / size for mean, size in zip(means, n_cells, strict=True)
            ]
            columns += [means, lows, highs, nulls, fractions]
        return rows_by_index(columns)

    def _definitions(self) -> Iterator[TableRow]:
        import numpy as np

        for tensor in POINTS:
            for definition in DEFINITIONS[: 2 if tensor == "v" else 3]:
                values = self.values(f"{tensor}.{definition}")
                n_texts = (~np.isnan(values)).sum(0)
                is_pairs = definition == "pairs"
                sizes = self._n_pairs(tensor) if is_pairs else self._n_cells(tensor)
                nulls = null_means(self, self.values(f"{tensor}.{'null_pairs' if is_pairs else 'null'}"))
                for layer, (mean, low, high) in enumerate(zip(*mean_intervals(self, values), strict=True)):
                    fraction = None if mean is None else mean / sizes[layer]
                    yield layer, tensor, definition, mean, low, high, nulls[layer], fraction, n_texts[layer]

    def _summary(self) -> TableRow:
        import numpy as np

        row: list[float | None] = []
        for tensor in POINTS:
            mean, n_cells = self.mean_by_layer(f"{tensor}.{self.params.mean}"), self._n_cells(tensor)
            mean, n_cells = mean[~np.isnan(n_cells)], n_cells[~np.isnan(n_cells)]
            row += (
                [none_if_nan(mean.sum()), none_if_nan((mean / n_cells).mean())] if mean.size else [None, None]
            )
        return (*row, self.n_texts("q.global"))


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [MassiveValues]
