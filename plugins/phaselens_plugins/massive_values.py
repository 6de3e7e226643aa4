"""Massive values in queries, keys and values: how many cells (head × dimension) of a layer are far over the mean.

Jin et al. 2025 (arXiv:2502.01563). Two means are in use, over all cells of a tensor and over each head's; and some
count before the rotation, which mixes dimensions. All are here, each under its own name.

Only the norm of a pair of dimensions that the rotation mixes is the same before and after it. The pairs are those of
the model's own rotation (`ModelInfo.rotations`), whether that is applied, nulled or dropped; dimensions that it leaves
alone are in no pair.
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
    N_TOKENS,
    NOT_FINITE,
    SHORT,
    TEXT,
    ZERO,
    Grid,
    cell,
    interval_columns,
    intervals,
    keep,
    real_rows,
    some,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import Rotation

#: Tensors by the name they have in the tables: after the rotation, and before it (and before norms of q and k).
POINTS = {
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "q_pre": "attn.hook_q",
    "k_pre": "attn.hook_k",
}
DEFINITIONS = ("global", "per_head", "pairs")
#: What is kept of a tensor of a text, in this order.
KEPT = ("global", "per_head", "max_ratio", "null", "pairs", "null_pairs")
CELLS = "cells"
PAIRS = "pairs"
SHARE = "share of cells"
TENSOR = Column(
    "tensor", str, None, "q, k, v after rotation; q_pre, k_pre as projected, before norms and rotation"
)


@dataclass(frozen=True)
class ValueParams(Params):
    """What the metric can be asked for."""

    multiple: float = param(5.0, help="a cell is massive above this many times the mean cell", minimum=0)
    mean: str = param(
        "global",
        help="the mean of the layers table: over all cells of a tensor, or over each head's",
        choices=("global", "per_head"),
    )


def _by_tensor() -> Iterator[Column]:
    for place, tensor in enumerate(POINTS):
        where = (
            "after rotation" if tensor in ("q", "k") else "before rotation" if "pre" in tensor else "values"
        )
        low, high, null = (
            ("ci_low", "ci_high", "null")
            if place == 0
            else (f"{tensor}_{end}" for end in ("low", "high", "null"))
        )
        yield Column(tensor, float, CELLS, f"massive cells of {tensor[0]}, {where}, mean over texts")
        yield from interval_columns(CELLS, low, high)
        yield Column(null, float, CELLS, "expected number for Gaussian values")
        yield Column(f"{tensor}_fraction", float, SHARE, "the same as a share of the tensor's cells")


class MassiveValues(Grid[ValueParams]):
    """Massive cells of queries, keys and values, by text and layer."""

    name = "massive-values"
    version = "2"
    title = "massive values in Q, K, V"
    description = "cells of queries, keys and values whose norm is far over the mean"
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
                Column("count_global", float, CELLS, "over the mean of all cells"),
                Column("fraction_global", float, SHARE, "the same as a share"),
                Column("count_per_head", float, CELLS, "over the mean of their head"),
                Column("fraction_per_head", float, SHARE, "the same as a share"),
                Column(
                    "count_pairs",
                    float,
                    PAIRS,
                    "pairs of dimensions that the rotation mixes, over the mean of all such pairs; null without any",
                ),
                Column("fraction_pairs", float, "share of pairs", "the same as a share"),
                Column("max_ratio", float, "ratio", "largest cell over the mean of all cells"),
                Column("null", float, CELLS, "expected count_global for Gaussian values"),
                Column("null_pairs", float, PAIRS, "expected count_pairs for Gaussian values"),
                N_TOKENS,
            ),
            "a row per text, layer and tensor",
        ),
        TableSpec("layers", (LAYER, *_by_tensor()), "a row per layer, by the chosen mean"),
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
                Column("count", float, CELLS, "mean over texts; for pairs, as null is, a number of pairs"),
                *interval_columns(CELLS),
                Column("null", float, CELLS, "expected number for Gaussian values"),
                Column("fraction", float, SHARE, "mean over texts"),
                N_TEXTS,
            ),
            "every definition, by layer and tensor",
        ),
        TableSpec(
            "summary",
            (
                *(
                    Column(f"{tensor}_{kind}", float, unit, text)
                    for tensor in POINTS
                    for kind, unit, text in (
                        ("total", CELLS, "sum over layers of the mean over texts"),
                        ("fraction", SHARE, "mean over layers"),
                    )
                ),
                N_TEXTS,
            ),
            "a row per model, by the chosen mean",
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
        summary=(("q_total", "Q in all"), ("k_total", "K in all"), ("v_total", "V in all")),
    )

    @classmethod
    def define(cls, params: ValueParams) -> str:
        """Which mean and which side of the rotation is shown."""
        over = {"global": "all cells of the tensor", "per_head": "the cells of its head"}[params.mean]
        return (
            f"cells (head × dimension) whose norm over the text exceeds {params.multiple:g} × the mean of {over}; "
            "queries and keys after rotation"
        )

    def hooks(self) -> Sequence[str]:
        """Queries and keys on both sides of the rotation, and values."""
        return [f"blocks.{{layer}}.{point}" for point in POINTS.values()]

    def update(self, layer: LayerView) -> None:
        """Counts of this layer for the texts of the batch."""
        parts = {tensor: list(real_rows(layer, point)) for tensor, point in POINTS.items()}
        pairs = self._pairs(layer.index or 0)
        texts = [{tensor: rows[text] for tensor, rows in parts.items()} for text in range(layer.batch.n)]
        keep(self, layer, [self._one(states, pairs) for states in texts])

    def _one(self, states: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Counts of one text, states [pos, head, d_head] by tensor."""
        from phaselens.attention import gaussian_massive_share, massive_cells, norm_matrix, pair_norms

        multiple, missing = self.params.multiple, float("nan")
        n_tokens = len(states["q"])
        result: dict[str, Any] = {"problem": FINE}
        for tensor in POINTS:
            norms = norm_matrix(states[tensor])
            finite = bool(norms.isfinite().all())
            if not finite or not bool((norms > 0).any()):
                result["problem"] = SHORT if not n_tokens else ZERO if finite else NOT_FINITE
                result[tensor] = [missing] * len(KEPT)
                continue
            counts = [float(massive_cells(norms, multiple, over).sum()) for over in ("global", "per_head")]
            null = norms.numel() * gaussian_massive_share(n_tokens, multiple)
            of_pairs = [missing] * 2
            if tensor != "v" and pairs:
                by_pair = pair_norms(norms, pairs)
                if bool((by_pair > 0).any()):
                    null_pairs = by_pair.numel() * gaussian_massive_share(2 * n_tokens, multiple)
                    of_pairs = [float(massive_cells(by_pair, multiple).sum()), null_pairs]
            result[tensor] = [*counts, float(norms.max() / norms.mean()), null, *of_pairs]
        return result

    def _pairs(self, layer: int) -> tuple[tuple[int, int], ...]:
        """The dimensions of a head that this layer's rotation mixes."""
        rotation = self._rotation(layer)
        return rotation.pairs if rotation is not None else ()

    def _rotation(self, layer: int) -> Rotation | None:
        return self.model.rotations[layer] if self.model.rotations else None

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.explain("count")
        for tensor in POINTS:
            numbers = self.per_text.stack(tensor)
            for index, name in enumerate(KEPT):
                self.derived[f"{tensor}.{name}"] = numbers[..., index]
        self._explain_pairs()
        return {
            "texts": self.table("texts", self._texts()),
            "layers": self.table("layers", self._layers()),
            "definitions": self.table("definitions", self._definitions()),
            "summary": self.table("summary", [self._summary()]),
        }

    def _cells(self, tensor: str) -> int:
        model = self.model
        return model.d_head * (model.n_heads if tensor.startswith("q") else model.n_kv_heads)

    def _explain_pairs(self) -> None:
        """Say why layers have no pairs."""
        import numpy as np

        reasons: dict[str, list[str]] = {}
        for layer, kind in enumerate(self.model.positions):
            rotation = self._rotation(layer)
            if rotation is not None and rotation.pairs:
                continue
            if rotation is not None:
                reason = f"the rotation could not be read: {rotation.problem}"
            elif "rope" in kind:
                reason = "which dimensions the rotation mixes is not known"
            else:
                reason = "queries and keys are not rotated there, so no pairs are mixed"
            reasons.setdefault(reason, []).append(str(layer))
        for reason, layers in reasons.items():
            self.warn(f"count_pairs is null in layer {', '.join(layers)}: {reason}")
        for tensor in POINTS:
            has_pairs = ~np.isnan(self._n_pairs(tensor))
            zero = (
                np.isnan(self.values(f"{tensor}.pairs"))
                & ~np.isnan(self.values(f"{tensor}.global"))
                & has_pairs
            )
            if tensor != "v" and zero.any():
                places = ", ".join(map(str, np.flatnonzero(zero.any(0))))
                self.warn(
                    f"count_pairs of {tensor} is null in layer {places} for text "
                    f"{some(self.per_text.texts, zero.any(1))}: the dimensions that the rotation mixes are all zero"
                )

    def _n_pairs(self, tensor: str) -> np.ndarray:
        """[layer]: pairs of all heads; NaN without any."""
        import numpy as np

        heads = self._cells(tensor) // self.model.d_head
        n_pairs = np.array(
            [len(self._pairs(layer)) for layer in range(self.model.n_layers)], dtype=np.float64
        )
        return heads * np.where(n_pairs > 0, n_pairs, np.nan)

    def _texts(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        texts, lengths = self.per_text.texts, self.per_text.lengths
        n_pairs = {tensor: self._n_pairs(tensor) for tensor in POINTS if tensor != "v"}
        for text, layer in np.ndindex(self.values("q.global").shape):
            for tensor in POINTS:
                n_cells = self._cells(tensor)
                whole, head, pairs, ratio, null, null_pairs = (
                    self.values(f"{tensor}.{name}")[text, layer]
                    for name in ("global", "per_head", "pairs", "max_ratio", "null", "null_pairs")
                )
                share = pairs / n_pairs[tensor][layer] if tensor in n_pairs else pairs
                numbers = (
                    whole,
                    whole / n_cells,
                    head,
                    head / n_cells,
                    pairs,
                    share,
                    ratio,
                    null,
                    null_pairs,
                )
                yield texts[text], layer, tensor, n_cells, *map(cell, numbers), lengths[text]

    def _layers(self) -> Iterator[tuple[Any, ...]]:
        columns: list[Sequence[float | None]] = []
        for tensor in POINTS:
            mean, low, high = intervals(self, self.values(f"{tensor}.{self.params.mean}"))
            null = intervals(self, self.values(f"{tensor}.null"), n_resamples=1)[0]
            n_cells = self._cells(tensor)
            columns += [mean, low, high, null, [None if one is None else one / n_cells for one in mean]]
        for layer, row in enumerate(zip(*columns, strict=True)):
            yield layer, *row

    def _definitions(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        for tensor in POINTS:
            for definition in DEFINITIONS[: 2 if tensor == "v" else 3]:
                values = self.values(f"{tensor}.{definition}")
                n_texts = (~np.isnan(values)).sum(0)
                is_pairs = definition == "pairs"
                sizes = self._n_pairs(tensor) if is_pairs else np.full(values.shape[1], self._cells(tensor))
                nulls = self.values(f"{tensor}.{'null_pairs' if is_pairs else 'null'}")
                null = intervals(self, nulls, n_resamples=1)[0]
                for layer, (mean, low, high) in enumerate(zip(*intervals(self, values), strict=True)):
                    share = None if mean is None else mean / sizes[layer]
                    yield layer, tensor, definition, mean, low, high, null[layer], share, n_texts[layer]

    def _summary(self) -> tuple[Any, ...]:
        row: list[float | None] = []
        for tensor in POINTS:
            mean = self.mean_by_layer(f"{tensor}.{self.params.mean}")
            row += [cell(mean.sum()), cell(mean.mean() / self._cells(tensor))]
        return (*row, self.n_texts("q.global"))


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [MassiveValues]
