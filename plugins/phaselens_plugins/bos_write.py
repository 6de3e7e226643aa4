"""Writes of attention heads from position 0: its attention mass, its value vector, and both combined.

The write score (attention × ‖v₀‖) ignores the output projection. The true write ‖A[h, q, 0] · v₀ · W_O‖ includes it,
and is compared with everything that the head, and the layer's attention, write at the same queries.

The writes of all heads sum, with the bias, to the attention module's output. Where a norm or a gate scales the heads'
outputs before the output projection, position 0's part is scaled by the factors that the forward had at that query (the
norm is frozen); where the projection rounds its input, a head's write is W_O times its part of the rounded input.
Factors that the block applies to the module's output (Granite's multiplier, Gemma 2's norm) are not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from phaselens.plugin import (
    Column,
    Display,
    InputError,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    in_layer,
)
from phaselens_plugins._common import (
    LAYER,
    N_TEXTS,
    N_TOKENS,
    TEXT,
    LayerText,
    Numbers,
    TableRow,
    index_of_largest,
    interval_columns,
    layer_texts,
    mean_intervals,
    mean_or_none,
    none_if_nan,
    null_means,
    rows_by_index,
    rows_by_text,
    store_by_text,
)
from phaselens_plugins._layer_metric import (
    NO_PROBLEM,
    NOT_FINITE,
    SHORT,
    UNSEEN,
    ZERO,
    LayerMetric,
    Quantity,
    layer_tables,
    missing_record,
)

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.plugin import Projection

NORM = "norm"
QUANTITIES = (
    Quantity("write", NORM, "attn, the attention on position 0 of the queries ≥ 1 that see it, times ‖v₀‖",
             "write under uniform attention"),
    Quantity("attn", "share of attention", "attention on position 0, mean over the queries ≥ 1 that see it",
             "uniform attention"),
    Quantity("value_norm", NORM, "‖v₀‖, before the output projection",
             "mean norm of the values at the other positions"),
    Quantity("true_write", NORM, "‖A·v₀·W_O‖, mean over the same queries; where a norm or gate scales the head's "
             "output before W_O, with the factors of the forward", "true_write under uniform attention"),
    Quantity("head_output", NORM, "norm of all that the head writes, mean over the same queries; the heads' writes "
             "sum, with the bias, to the layer's output"),
    Quantity("true_share", "ratio", "true_write over head_output; can exceed 1 where other keys cancel it",
             "uniform attention's true write over the same head_output"),
)  # fmt: skip
LAYER_COLUMNS = (
    Column(
        "layer_write",
        float,
        NORM,
        "‖Σ_h A·v₀·W_O‖ of all heads together, mean over the queries ≥ 1 that see position 0",
    ),
    Column(
        "layer_output",
        float,
        NORM,
        "norm of the output projection's result, bias included, mean over the same queries",
    ),
    Column("layer_share", float, "ratio", "layer_write over layer_output"),
)


class _AttentionStates(NamedTuple):
    """States of one text in one layer.

    sink [head, query], v [pos, kv_head, d_head], z [pos, head, d_head], attn_out [pos, d_model]; attended is z before
    it is scaled, or None where nothing scales it."""

    sink: Tensor
    v: Tensor
    z: Tensor
    attn_out: Tensor
    attended: Tensor | None


class _BosWrites(NamedTuple):
    """Norms of what position 0 writes, by head [head] and for the layer [], measured and under uniform attention."""

    heads: Tensor
    layer: Tensor
    heads_null: Tensor
    layer_null: Tensor


class BosWrite(LayerMetric[Params]):
    """Metric of position 0's value norm, attention mass, write score and true write, by text, layer and head."""

    name = "bos-write"
    version = "2"
    title = "what heads write from BOS"
    description = "value norm, attention mass, write score and true write of position 0"
    citation = "value norms of sinks: Gu et al. 2024, arXiv:2410.10781"
    quantities = QUANTITIES
    tables = (
        *layer_tables(QUANTITIES, heads=True),
        TableSpec(
            "together",
            (
                LAYER,
                Column("layer_share", float, "ratio", "mean over texts"),
                *interval_columns("ratio"),
                Column("null", float, "ratio", "uniform attention's write over the same output"),
                Column("layer_write", float, NORM, "mean over texts"),
                Column("layer_output", float, NORM, "mean over texts"),
                N_TEXTS,
            ),
            "all heads of a layer together",
        ),
        TableSpec(
            "layer_texts",
            (TEXT, LAYER, *LAYER_COLUMNS, N_TOKENS),
            "all heads of a layer together, one row per text and layer",
        ),
        TableSpec(
            "summary",
            (
                Column("write", float, NORM, "mean over texts, layers and heads"),
                Column("write_median", float, NORM, "median over layers of the mean over texts and heads"),
                Column("write_layer", int, "index", "layer of the largest mean write"),
                Column("attn", float, "share of attention", "mean over texts, layers and heads"),
                Column("true_share", float, "ratio", "mean over texts, layers and heads"),
                Column("layer_share", float, "ratio", "mean over texts and layers"),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="true_share",
        title="true share",
        low="true_share_low",
        high="true_share_high",
        null="true_share_null",
        also=(("write", "write"),),
        summary=(
            ("write", "write"),
            ("attn", "attention"),
            ("true_share", "true share"),
            ("layer_share", "of layer"),
        ),
        by_head="true_share",
    )

    @classmethod
    def define(cls, params: Params) -> str:
        """State what is multiplied and averaged, and in which order."""
        return (
            "write = attention on position 0 × ‖v₀‖ by text and head, then the mean; true share = ‖A·v₀·W_O‖ / "
            "‖head output‖, means over the queries ≥ 1 that see position 0 (with a sliding window, those within it)"
        )

    def setup(self) -> None:
        """Start with no output projections (None where one is refused) and triangular factors, by layer."""
        super().setup()
        self.projections: dict[int, Projection | None] = {}
        self.factors: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the projections, which refer to the model's modules and can be read again."""
        return {**vars(self), "projections": {}, "factors": {}}

    def hooks(self) -> Sequence[str]:
        """Return the points of attention on position 0, values, head outputs, and the output projection's result."""
        points = ["hook_sink", "hook_v", "hook_z", "hook_out"]
        if "scaled" in self.model.head_outputs:
            points.append("hook_attended")
        return [in_layer("{layer}", f"attn.{point}") for point in points]

    def update(self, layer: LayerView) -> None:
        """Measure the writes of this layer for the texts of the batch."""
        projection = self._projection(layer)
        texts = layer_texts(layer)
        states = [self._states(text, projection) for text in texts]
        records = [self._measure(layer.index or 0, text_states, projection) for text_states in states]
        store_by_text(self, layer, records)

    def _states(self, text: LayerText, projection: Projection | None) -> _AttentionStates:
        is_scaled_before_projection = self._head_output(text.layer.index or 0) == "scaled"
        attended = text["attn.hook_attended" if is_scaled_before_projection else "attn.hook_z"]
        is_scaled = projection is not None and (is_scaled_before_projection or projection.norm is not None)
        return _AttentionStates(
            sink=text.layer["attn.hook_sink"][text.index, :, : text.n_tokens],
            v=text["attn.hook_v"],
            z=text["attn.hook_z"],
            attn_out=text["attn.hook_out"],
            attended=attended if is_scaled else None,
        )

    def _measure(
        self, index: int, states: _AttentionStates, projection: Projection | None
    ) -> dict[str, Numbers]:
        """Measure one text in layer `index`; numbers that need a projection are NaN without one."""
        from phaselens.attention import head_norms, uniform_sink
        from phaselens.spectrum import row_norms

        sink, v, z, attn_out, _ = states
        n_heads, n_tokens = len(sink), len(v)
        if n_tokens < 2:
            return _missing_record(SHORT, n_heads)
        window = self.model.windows[index]
        seeing = slice(1, min(n_tokens, window or n_tokens))
        if seeing.stop < 2:
            return _missing_record(UNSEEN, n_heads)
        group = n_heads // v.shape[1]
        layer_output, other_value_norms = row_norms(attn_out[seeing]).mean(), row_norms(v[1:]).mean(0)
        attn = sink[:, seeing].double().mean(-1)
        value_norms = row_norms(v[0].double()).repeat_interleave(group)
        uniform = uniform_sink(n_tokens, window=window) or 0.0
        record = _missing_record(NO_PROBLEM, n_heads) | {
            "attn": attn.tolist(),
            "attn_null": [uniform] * n_heads,
            "value_norm": value_norms.tolist(),
            "value_norm_null": other_value_norms.repeat_interleave(group).tolist(),
            "write": (attn * value_norms).tolist(),
            "write_null": (uniform * value_norms).tolist(),
            "layer_output": float(layer_output),
        }
        measured = (attn, value_norms, layer_output, other_value_norms)
        if not all(bool(values.isfinite().all()) for values in measured):
            return _missing_record(NOT_FINITE, n_heads)
        if projection is None:
            return record
        head_output = head_norms(projection.multiplied(z[seeing]), self.factors[index]).mean(0)
        if not bool(head_output.isfinite().all()):
            return _missing_record(NOT_FINITE, n_heads)
        if not bool((head_output > 0).all()):
            return _missing_record(ZERO, n_heads)
        record["head_output"] = head_output.tolist()
        bos_writes = self._bos_writes(index, states, projection, seeing)
        if bos_writes is None:
            return record
        if not bool(bos_writes.heads.isfinite().all()):
            return _missing_record(NOT_FINITE, n_heads)
        return record | {
            "true_write": bos_writes.heads.tolist(),
            "true_write_null": bos_writes.heads_null.tolist(),
            "true_share": (bos_writes.heads / head_output).tolist(),
            "true_share_null": (bos_writes.heads_null / head_output).tolist(),
            "layer_write": float(bos_writes.layer),
            "layer_share": float(bos_writes.layer / layer_output),
            "layer_share_null": float(bos_writes.layer_null / layer_output),
        }

    def _bos_writes(
        self, index: int, states: _AttentionStates, projection: Projection, seeing: slice
    ) -> _BosWrites | None:
        """Return position 0's writes to queries that see it; None if its part of the projection's input is unknown."""
        import torch

        from phaselens.attention import scaled_writes, uniform_sink, uniform_sink_rows, writes

        sink, v, z, _, attended = states
        window = self.model.windows[index]
        bos_value = v[0].double().repeat_interleave(len(sink) // v.shape[1], dim=0)
        if self._head_output(index) == "mixed":
            self.warn(
                f"true_write, true_share and layer_write are missing in layer {index}: the operation between the heads "
                "and the output projection does more than scale each entry, so position 0's part cannot be separated"
            )
            return None
        if attended is None:
            unscaled_writes = writes(sink[:, seeing].double(), bos_value, projection.weight)
            uniform = uniform_sink(len(v), window=window) or 0.0
            return _BosWrites(
                unscaled_writes.heads,
                unscaled_writes.layer,
                uniform * unscaled_writes.value_writes,
                uniform * unscaled_writes.layer_value_write,
            )
        weights, unscaled = sink[:, seeing].double(), attended[seeing].double()
        receives_bos = (weights.T[..., None] > 0) & (bos_value != 0)
        if bool((receives_bos & (unscaled == 0)).any()):
            self.warn(
                f"true_write, true_share and layer_write are missing in layer {index} for some texts: a head's output "
                "is exactly 0 there, so that the factor before the output projection cannot be read from it"
            )
            return None
        factors = torch.where(
            unscaled == 0,
            0.0,
            projection.scaled(z[seeing]).double() / torch.where(unscaled == 0, 1.0, unscaled),
        )
        values = factors * bos_value
        uniform_weights = uniform_sink_rows(len(v), window)[seeing].to(weights.device).expand_as(weights)
        heads, layer = scaled_writes(weights, values, projection.weight, self.factors[index])
        heads_null, layer_null = scaled_writes(
            uniform_weights, values, projection.weight, self.factors[index]
        )
        return _BosWrites(heads, layer, heads_null, layer_null)

    def _projection(self, layer: LayerView) -> Projection | None:
        """Return the layer's output projection, None if it is refused; read it and its factors once per layer."""
        from phaselens.attention import triangular

        index = layer.index or 0
        if index not in self.projections:
            try:
                projection = layer.projection("attn.W_O")
            except InputError as error:
                self.warn(f"all that needs the output projection is missing in layer {index}: {error}")
                self.projections[index] = None
            else:
                self.projections[index] = projection
                self.factors[index] = triangular(projection.weight)
        return self.projections[index]

    def _head_output(self, index: int) -> str:
        return self.model.head_outputs[index] if self.model.head_outputs else "same"

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.projections.clear()
        self.factors.clear()
        self.explain("write")
        layer_columns = [self.values(column.name) for column in LAYER_COLUMNS]
        return {
            "texts": self.texts_table(),
            "layers": self.layers_table(),
            "heads": self.heads_table(),
            "together": self._together_table(),
            "layer_texts": self.table("layer_texts", rows_by_text(self, layer_columns)),
            "summary": self.table("summary", [self._summary()]),
        }

    def _together_table(self) -> Table:
        import numpy as np

        share = self.values("layer_share")
        present = ~np.isnan(share)
        nulls = null_means(self, self.values("layer_share_null"), where=present)
        means = [
            [none_if_nan(mean) for mean in self.mean_by_layer(name)]
            for name in ("layer_write", "layer_output")
        ]
        columns = [*mean_intervals(self, share), nulls, *means, present.sum(0)]
        return self.table("together", rows_by_index(columns))

    def _summary(self) -> TableRow:
        import numpy as np

        write = self.mean_by_layer("write")
        return (
            mean_or_none(self.values("write")),
            None if np.isnan(write).all() else float(np.nanmedian(write)),
            index_of_largest(write),
            *(mean_or_none(self.values(name)) for name in ("attn", "true_share", "layer_share")),
            self.n_texts("write"),
        )


def _missing_record(problem: int, n_heads: int) -> dict[str, Numbers]:
    by_head: dict[str, Numbers] = {
        name: [missing] * n_heads for name, missing in missing_record(QUANTITIES, problem).items()
    }
    by_layer = dict.fromkeys([*(column.name for column in LAYER_COLUMNS), "layer_share_null"], float("nan"))
    return by_head | by_layer | {"problem": problem}


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [BosWrite]
