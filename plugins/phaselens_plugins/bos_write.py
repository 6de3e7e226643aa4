"""What the heads write from position 0: its attention mass, its value vector, and the two together.

The write score (attention × ‖v₀‖) ignores the output projection, so beside it stands the true write
‖A[h, q, 0] · v₀ · W_O‖, against all that the head and all that the layer's attention write at the same queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Params, Table, TableSpec, hookimpl
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

NORM = "norm"
VALUES = (
    Value("write", NORM, "attention on position 0 times ‖v₀‖", "the same under uniform attention"),
    Value("attn", "share of attention", "attention on position 0, mean over the queries ≥ 1 that see it",
          "uniform attention"),
    Value("value_norm", NORM, "‖v₀‖, before the output projection",
          "mean norm of the values at the other positions"),
    Value("true_write", NORM, "‖A·v₀·W_O‖, mean over the same queries", "the same under uniform attention"),
    Value("head_output", NORM, "norm of all that the head writes, mean over the same queries"),
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
        """Triangular factors of the output projections, by layer."""
        super().setup()
        self.factors: dict[int, Tensor] = {}

    def hooks(self) -> Sequence[str]:
        """Attention on position 0, values, head outputs, and the output projection's result."""
        return [f"blocks.{{layer}}.attn.{point}" for point in ("hook_sink", "hook_v", "hook_z", "hook_out")]

    def update(self, layer: LayerView) -> None:
        """Writes of this layer for the texts of the batch."""
        sinks = layer["attn.hook_sink"]
        parts = [real_rows(layer, f"attn.{point}") for point in ("hook_v", "hook_z", "hook_out")]
        rows = enumerate(zip(layer.batch.lengths, *parts, strict=True))
        keep(self, layer, [self._one(layer, sinks[row, :, :n], v, z, out) for row, (n, v, z, out) in rows])

    def _one(self, layer: LayerView, sink: Tensor, v: Tensor, z: Tensor, out: Tensor) -> dict[str, Any]:
        """sink [head, query], v [pos, kv_head, d_head], z [pos, head, d_head], out [pos, d_model] of one text."""
        from phaselens.attention import head_norms, uniform_sink, writes
        from phaselens.spectrum import row_norms

        n_heads = len(sink)
        if v.shape[0] < 2:
            return _nothing(SHORT, n_heads)
        window = self.model.windows[layer.index or 0]
        seeing = slice(1, min(len(v), window or len(v)))
        if seeing.stop < 2:
            return _nothing(UNSEEN, n_heads)
        w_o, factor = self._projection(layer)
        first = v[0].double().repeat_interleave(n_heads // v.shape[1], dim=0)
        found = writes(sink[:, seeing].double(), first, w_o)
        heads = head_norms(z[seeing], factor).mean(0)
        whole, others = row_norms(out[seeing]).mean(), row_norms(v[1:]).mean(0)
        attn = sink[:, seeing].double().mean(-1)
        if not all(bool(each.isfinite().all()) for each in (attn, found.heads, heads, whole, others)):
            return _nothing(NOT_FINITE, n_heads)
        if not bool((heads > 0).all()):
            return _nothing(ZERO, n_heads)
        uniform = uniform_sink(len(v), window=window) or 0.0
        norms = row_norms(first)
        flat_write = uniform * found.value_writes
        return {
            "attn": attn.tolist(),
            "attn_null": [uniform] * n_heads,
            "value_norm": norms.tolist(),
            "value_norm_null": others.repeat_interleave(n_heads // v.shape[1]).tolist(),
            "write": (attn * norms).tolist(),
            "write_null": (uniform * norms).tolist(),
            "true_write": found.heads.tolist(),
            "true_write_null": flat_write.tolist(),
            "head_output": heads.tolist(),
            "true_share": (found.heads / heads).tolist(),
            "true_share_null": (flat_write / heads).tolist(),
            "layer_write": float(found.layer),
            "layer_output": float(whole),
            "layer_share": float(found.layer / whole),
            "layer_share_null": float(uniform * found.together / whole),
            "problem": FINE,
        }

    def _projection(self, layer: LayerView) -> tuple[Tensor, Tensor]:
        """W_O [head, d_head, d_model] and its triangular factors, which are made once a layer."""
        from phaselens.attention import triangular

        index, w_o = layer.index or 0, layer.weight("attn.W_O")
        if index not in self.factors:
            self.factors[index] = triangular(w_o)
        return w_o, self.factors[index]

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
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
