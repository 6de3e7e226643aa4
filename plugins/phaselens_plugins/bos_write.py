"""What the heads write from position 0: its attention mass, its value vector, and the two together.

The write score (attention × ‖v₀‖) ignores the output projection, so beside it stands the true write
‖A[h, q, 0] · v₀ · W_O‖, against all that the head and all that the layer's attention write at the same queries.

What heads write adds up, with the bias, to what the attention module gives. Where a norm or a gate scales the heads'
outputs before the output projection, position 0's part is scaled by the factors that the forward had at that query (the
norm is frozen); where the projection rounds its input, what a head writes is W_O times its part of the rounded input.
Factors that the block applies to the module's output (Granite's multiplier, Gemma 2's norm) are left out.
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
)
from phaselens_plugins._common import (
    FINE,
    LAYER,
    N_TEXTS,
    N_TOKENS,
    NOT_FINITE,
    SHORT,
    TEXT,
    UNSEEN,
    ZERO,
    Grid,
    Value,
    best,
    cell,
    grid_tables,
    interval_columns,
    intervals,
    keep,
    nothing,
    overall,
    real_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.plugin import Projection

NORM = "norm"
VALUES = (
    Value("write", NORM, "attn, the attention on position 0 of the queries ≥ 1 that see it, times ‖v₀‖",
          "the same under uniform attention"),
    Value("attn", "share of attention", "attention on position 0, mean over the queries ≥ 1 that see it",
          "uniform attention"),
    Value("value_norm", NORM, "‖v₀‖, before the output projection",
          "mean norm of the values at the other positions"),
    Value("true_write", NORM, "‖A·v₀·W_O‖, mean over the same queries; where a norm or gate scales the head's output "
          "before W_O, with the factors of the forward", "the same under uniform attention"),
    Value("head_output", NORM, "norm of all that the head writes, mean over the same queries; what heads write adds "
          "up, with the bias, to the layer's output"),
    Value("true_share", "ratio", "true_write over head_output; can exceed 1 where other keys cancel it",
          "uniform attention's true write over the same head_output"),
)  # fmt: skip
OF_LAYER = (
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


class _States(NamedTuple):
    """One text of a layer: sink [head, query], v [pos, kv_head, d_head], z [pos, head, d_head], out [pos, d_model];
    attended as z, before what scales it, or None where nothing does."""

    sink: Tensor
    v: Tensor
    z: Tensor
    out: Tensor
    attended: Tensor | None


class _FirstWrites(NamedTuple):
    """What position 0 writes, by head [head] and all together [], and the same under uniform attention."""

    heads: Tensor
    layer: Tensor
    heads_null: Tensor
    layer_null: Tensor


class BosWrite(Grid[Params]):
    """BOS value norm, attention mass, write score and true write, by text, layer and head."""

    name = "bos-write"
    version = "2"
    title = "what heads write from BOS"
    description = "value norm, attention mass, write score and true write of position 0"
    citation = "value norms of sinks: Gu et al. 2024, arXiv:2410.10781"
    tables = (
        *grid_tables(VALUES, heads=True),
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
        TableSpec("layer_texts", (TEXT, LAYER, *OF_LAYER, N_TOKENS), "the same, a row per text and layer"),
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
            "a row per model",
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
        """What is multiplied and averaged, in which order."""
        return (
            "write = attention on position 0 × ‖v₀‖ by text and head, then the mean; true share = ‖A·v₀·W_O‖ / "
            "‖head output‖, means over the queries ≥ 1 that see position 0 (with a sliding window, those within it)"
        )

    def setup(self) -> None:
        """Output projections, None where one is refused, and their triangular factors, by layer."""
        super().setup()
        self.outputs: dict[int, Projection | None] = {}
        self.factors: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without projections, which hold the model's own modules; they are read again."""
        return {**vars(self), "outputs": {}, "factors": {}}

    def hooks(self) -> Sequence[str]:
        """Attention on position 0, values, head outputs, and the output projection's result."""
        points = ["hook_sink", "hook_v", "hook_z", "hook_out"]
        if "scaled" in self.model.head_outputs:
            points.append("hook_attended")
        return [f"blocks.{{layer}}.attn.{point}" for point in points]

    def update(self, layer: LayerView) -> None:
        """Writes of this layer for the texts of the batch."""
        sinks = layer["attn.hook_sink"]
        output = self._output(layer)
        points = ["hook_v", "hook_z", "hook_out"]
        scaled = output is not None and self._is_scaled(layer, output)
        points.append("hook_attended" if self._head_output(layer.index or 0) == "scaled" else "hook_z")
        parts = zip(
            layer.batch.lengths, *(real_rows(layer, f"attn.{point}") for point in points), strict=True
        )
        texts = []
        for text, (n_tokens, v, z, out, attended) in enumerate(parts):
            states = _States(sinks[text, :, :n_tokens], v, z, out, attended if scaled else None)
            texts.append(self._one(layer, states, output))
        keep(self, layer, texts)

    def _one(self, layer: LayerView, states: _States, output: Projection | None) -> dict[str, Any]:
        """The numbers of one text; NaN for those that need the output projection, where there is none to use."""
        from phaselens.attention import head_norms, uniform_sink
        from phaselens.spectrum import row_norms

        sink, v, z, out, _ = states
        n_heads, index = len(sink), layer.index or 0
        if v.shape[0] < 2:
            return _nothing(SHORT, n_heads)
        window = self.model.windows[index]
        seeing = slice(1, min(len(v), window or len(v)))
        if seeing.stop < 2:
            return _nothing(UNSEEN, n_heads)
        group = n_heads // v.shape[1]
        whole, others = row_norms(out[seeing]).mean(), row_norms(v[1:]).mean(0)
        attn = sink[:, seeing].double().mean(-1)
        norms = row_norms(v[0].double()).repeat_interleave(group)
        uniform = uniform_sink(len(v), window=window) or 0.0
        result = _nothing(FINE, n_heads) | {
            "attn": attn.tolist(),
            "attn_null": [uniform] * n_heads,
            "value_norm": norms.tolist(),
            "value_norm_null": others.repeat_interleave(group).tolist(),
            "write": (attn * norms).tolist(),
            "write_null": (uniform * norms).tolist(),
            "layer_output": float(whole),
        }
        if not all(bool(values.isfinite().all()) for values in (attn, norms, whole, others)):
            return _nothing(NOT_FINITE, n_heads)
        if output is None:
            return result
        heads = head_norms(output.multiplied(z[seeing]), self.factors[index]).mean(0)
        if not bool(heads.isfinite().all()):
            return _nothing(NOT_FINITE, n_heads)
        if not bool((heads > 0).all()):
            return _nothing(ZERO, n_heads)
        result["head_output"] = heads.tolist()
        writes = self._writes(index, states, output, seeing)
        if writes is None:
            return result
        if not bool(writes.heads.isfinite().all()):
            return _nothing(NOT_FINITE, n_heads)
        return result | {
            "true_write": writes.heads.tolist(),
            "true_write_null": writes.heads_null.tolist(),
            "true_share": (writes.heads / heads).tolist(),
            "true_share_null": (writes.heads_null / heads).tolist(),
            "layer_write": float(writes.layer),
            "layer_share": float(writes.layer / whole),
            "layer_share_null": float(writes.layer_null / whole),
        }

    def _writes(self, index: int, states: _States, output: Projection, seeing: slice) -> _FirstWrites | None:
        """What position 0 writes to the queries that see it; None where its part in the projection's input is not
        known."""
        import torch

        from phaselens.attention import scaled_writes, uniform_sink, uniform_sink_rows, writes

        sink, v, z, _, attended = states
        window = self.model.windows[index]
        first = v[0].double().repeat_interleave(len(sink) // v.shape[1], dim=0)
        if self._head_output(index) == "mixed":
            self.warn(
                f"true_write, true_share and layer_write are null in layer {index}: what comes between the heads and "
                "the output projection does not just scale each entry, so position 0 has no part of its own in it"
            )
            return None
        if attended is None:
            plain = writes(sink[:, seeing].double(), first, output.weight)
            uniform = uniform_sink(len(v), window=window) or 0.0
            return _FirstWrites(
                plain.heads, plain.layer, uniform * plain.value_writes, uniform * plain.together
            )
        mass, read = sink[:, seeing].double(), attended[seeing].double()
        reached = (mass.T[..., None] > 0) & (first != 0)
        if bool((reached & (read == 0)).any()):
            self.warn(
                f"true_write, true_share and layer_write are null in layer {index} for some texts: a head's output is "
                "exactly 0 there, so that the factor before the output projection cannot be read from it"
            )
            return None
        factors = torch.where(
            read == 0, 0.0, output.scaled(z[seeing]).double() / torch.where(read == 0, 1.0, read)
        )
        values = factors * first
        flat = uniform_sink_rows(len(v), window)[seeing].to(mass.device).expand_as(mass)
        heads, layer = scaled_writes(mass, values, output.weight, self.factors[index])
        heads_null, layer_null = scaled_writes(flat, values, output.weight, self.factors[index])
        return _FirstWrites(heads, layer, heads_null, layer_null)

    def _output(self, layer: LayerView) -> Projection | None:
        """The layer's output projection, or None where it is refused; read once a layer, as are its factors."""
        from phaselens.attention import triangular

        index = layer.index or 0
        if index not in self.outputs:
            try:
                output = layer.projection("attn.W_O")
            except InputError as error:
                self.warn(f"all that needs the output projection is null in layer {index}: {error}")
                self.outputs[index] = None
            else:
                self.outputs[index] = output
                self.factors[index] = triangular(output.weight)
        return self.outputs[index]

    def _head_output(self, index: int) -> str:
        return self.model.head_outputs[index] if self.model.head_outputs else "same"

    def _is_scaled(self, layer: LayerView, output: Projection) -> bool:
        """Whether anything scales the heads' outputs before the product, in front of the projection or inside it."""
        return self._head_output(layer.index or 0) == "scaled" or output.norm is not None

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.outputs.clear()
        self.factors.clear()
        self.explain("write")
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "heads": self.heads_table(VALUES),
            "together": self._together(),
            "layer_texts": self._layer_texts(),
            "summary": self.table("summary", [self._summary()]),
        }

    def _together(self) -> Table:
        import numpy as np

        share, null = self.values("layer_share"), self.values("layer_share_null")
        present = ~np.isnan(share)
        columns = [*intervals(self, share), intervals(self, null, where=present, n_resamples=1)[0]]
        means = [[cell(one) for one in self.mean_by_layer(name)] for name in ("layer_write", "layer_output")]
        rows = zip(*columns, *means, present.sum(0), strict=True)
        return self.table("together", ((layer, *row) for layer, row in enumerate(rows)))

    def _layer_texts(self) -> Table:
        import numpy as np

        columns = [self.values(column.name) for column in OF_LAYER]
        texts, lengths = self.per_text.texts, self.per_text.lengths
        return self.table(
            "layer_texts",
            (
                (texts[at[0]], at[1], *(cell(column[at]) for column in columns), lengths[at[0]])
                for at in np.ndindex(columns[0].shape)
            ),
        )

    def _summary(self) -> tuple[Any, ...]:
        import numpy as np

        by_layer = self.mean_by_layer("write")
        return (
            overall(self.values("write")),
            None if np.isnan(by_layer).all() else float(np.nanmedian(by_layer)),
            best(by_layer),
            *(overall(self.values(name)) for name in ("attn", "true_share", "layer_share")),
            self.n_texts("write"),
        )


def _nothing(problem: int, n_heads: int) -> dict[str, Any]:
    of_heads = {
        name: [blank] * n_heads for name, blank in nothing(VALUES, problem).items() if name != "problem"
    }
    of_layer = dict.fromkeys([*(column.name for column in OF_LAYER), "layer_share_null"], float("nan"))
    return of_heads | of_layer | {"problem": problem}


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [BosWrite]
