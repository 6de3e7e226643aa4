"""Why a sink is a sink: directions and norms of queries and keys, and how far their products are from fp16's limit.

A head can prefer a key for its direction (the cosine of queries with it is larger than with other keys) or for its
norm. A key that all queries prefer by the same amount works like a bias of the softmax. Gu et al. 2024
(arXiv:2410.10781) describe sinks in these terms; METRICS 10.8.
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
    HEAD,
    LAYER,
    N_TEXTS,
    LayerText,
    Numbers,
    TableRow,
    head_exists,
    index_of_largest,
    layer_texts,
    mean_or_none,
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

QUERIES, KEYS, VALUES = "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v"
LARGEST = "attn.hook_largest_product"
FP16_MAX = 65504.0
"""The largest number of fp16."""
#: Where the largest product is: names under which its query and key are stored.
LOCATION = ("largest_query", "largest_key")
EQUAL_NORM = "1: a key like the others"
QUANTITIES = (
    Quantity("cosine", "cosine", "cosine of queries with the key, mean over the queries after it that see it",
             "cosine of the same queries with the other keys that they see"),
    Quantity("key_bias", "nats", "score of the key minus the mean score of the other keys seen, scaled, before a "
             "softcap, mean over the same queries", "0: a key like the others"),
    Quantity("key_bias_sd", "nats", "standard deviation of that difference over the queries: 0 for a pure bias"),
    Quantity("key_norm", "ratio", "norm of the key over the median norm of the text's keys", EQUAL_NORM),
    Quantity("value_norm", "ratio", "norm of its value over the median norm of the text's values", EQUAL_NORM),
    Quantity("largest", "product", "largest |q·k| of any query and a key that it sees, without scale"),
)  # fmt: skip


@dataclass(frozen=True)
class GeometryParams(Params):
    """Parameters of the metric."""

    sink_position: int = param(0, help="the key that is compared with the others", unit="position", minimum=0)


class QkGeometry(LayerMetric[GeometryParams]):
    """Metric of the geometry of one key: cosines, norms, its advantage as a bias; and of the largest product."""

    name = "qk-geometry"
    version = "1"
    title = "geometry of the sink"
    description = "cosines and norms of queries, keys and values at the sink; headroom of scores in fp16"
    citation = "Gu et al. 2024, arXiv:2410.10781"
    Params = GeometryParams
    quantities = QUANTITIES
    tables = (
        *layer_tables(QUANTITIES, heads=True),
        TableSpec(
            "overflow",
            (
                LAYER,
                HEAD,
                Column("largest", float, "product", "largest |q·k| of all texts, without scale"),
                Column("headroom", float, "bits", "log2 of 65,504 over it: below 0, q·k overflows in fp16"),
                Column(
                    "overflows", int, "0 or 1", "whether it is greater than 65,504, fp16's largest number"
                ),
                Column("text", str, None, "the text in which it occurs"),
                Column("query", int, "position", "its query"),
                Column("key", int, "position", "its key"),
                N_TEXTS,
            ),
            "one row per layer and head: largest product of a query and a key that it sees",
        ),
        TableSpec(
            "summary",
            (
                Column("cosine", float, "cosine", "mean over texts, layers and heads"),
                Column(
                    "cosine_null", float, "cosine", "with the other keys, mean over texts, layers and heads"
                ),
                Column("key_bias", float, "nats", "mean over texts, layers and heads"),
                Column("key_norm", float, "ratio", "mean over texts, layers and heads"),
                Column("value_norm", float, "ratio", "mean over texts, layers and heads"),
                Column("largest", float, "product", "largest |q·k| of all texts, layers and heads"),
                Column("headroom", float, "bits", "log2 of 65,504 over it"),
                Column("overflows", str, None, "the heads whose products overflow in fp16, by layer"),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="cosine",
        title="cos(q, k₀)",
        low="ci_low",
        high="ci_high",
        null="null",
        also=(("key_bias", "bias, nats"), ("key_norm", "‖k₀‖"), ("value_norm", "‖v₀‖")),
        summary=(("largest", "max |q·k|"), ("headroom", "headroom, bits"), ("overflows", "overflow")),
        by_head="key_norm",
    )

    @classmethod
    def define(cls, params: GeometryParams) -> str:
        """State the key, the queries, and what overflows."""
        return (
            f"key at position {params.sink_position} after rotation, seen by the queries after it; null: the other "
            "keys that they see; norms over the text's median; overflow: |q·k| > 65,504, without scale"
        )

    def hooks(self) -> Sequence[str]:
        """Return the points of queries, keys and values, and of each query's largest product."""
        return [in_layer("{layer}", point) for point in (QUERIES, KEYS, VALUES, LARGEST)]

    def update(self, layer: LayerView) -> None:
        """Measure this layer for the texts of the batch."""
        store_by_text(self, layer, [self._measure(text) for text in layer_texts(layer)])

    def _measure(self, text: LayerText) -> dict[str, Numbers]:
        import torch

        from phaselens.attention import key_geometry, largest_product

        layer, position = text.layer.index or 0, self.params.sink_position
        window, n_heads = self.model.windows[layer], self.model.n_heads_in(layer)
        q, k, v = text[QUERIES], text[KEYS], text[VALUES]
        problem = self._problem(text, q, k, v)
        if problem in (SHORT, NOT_FINITE):
            names = [*missing_record(QUANTITIES, problem), *LOCATION]
            return {**dict.fromkeys(names, [float("nan")] * n_heads), "problem": problem}
        scale = self.model.scales[layer]
        assert scale is not None, "a layer with queries has attention"
        largest = largest_product(q, k, window=window, by_query=text.by_query(LARGEST))
        geometry = key_geometry(q, k, scale=scale, position=position, window=window)
        group = n_heads // k.shape[1]
        norms = [_norm_ratio(states, position).repeat_interleave(group) for states in (k, v)]
        values = {
            "cosine": geometry.cosine,
            "cosine_null": geometry.cosine_others,
            "key_bias": geometry.bias,
            "key_bias_null": torch.where(geometry.bias.isnan(), torch.nan, 0.0),
            "key_bias_sd": geometry.bias_sd,
            "key_norm": norms[0],
            "key_norm_null": torch.where(norms[0].isnan(), torch.nan, 1.0),
            "value_norm": norms[1],
            "value_norm_null": torch.where(norms[1].isnan(), torch.nan, 1.0),
            "largest": largest.value,
            **dict(zip(LOCATION, (largest.query, largest.key), strict=True)),
        }
        is_missing = any(bool(value.isnan().any()) for value in values.values())
        record: dict[str, Numbers] = {name: value.cpu().tolist() for name, value in values.items()}
        return {**record, "problem": (problem or ZERO) if is_missing else NO_PROBLEM}

    def _problem(self, text: LayerText, *states: Tensor) -> int:
        from phaselens.attention import all_finite

        if not all(map(all_finite, states)):
            return NOT_FINITE
        if text.n_tokens < self.params.sink_position + 2:
            return SHORT
        return UNSEEN if self.model.windows[text.layer.index or 0] == 1 else NO_PROBLEM

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model, and warn of the heads that would overflow."""
        self._explain()
        overflow = list(self._overflow_rows())
        self._warn_of_overflow(overflow)
        return {
            "texts": self.texts_table(),
            "heads": self.heads_table(),
            "layers": self.layers_table(),
            "overflow": self.table("overflow", overflow),
            "summary": self.table("summary", [self._summary(overflow)]),
        }

    def _explain(self) -> None:
        """Warn of missing values, with the reason."""
        if self.params.sink_position:
            is_short = [
                text_id
                for text_id, length in zip(self.per_text.texts, self.per_text.lengths, strict=True)
                if length < self.params.sink_position + 2
            ]
            if is_short:
                self.warn(
                    f"{len(is_short)} texts have no token after position {self.params.sink_position}, such as "
                    f"{is_short[0]!r}: their values are missing"
                )
        self.explain("geometry")

    def _overflow_rows(self) -> Iterator[TableRow]:
        """Yield layer, head, largest product over the texts, headroom, whether it overflows, and where it is."""
        import numpy as np

        products = self.values("largest")
        queries, keys = (self.per_text.stack(name) for name in LOCATION)
        for layer, head in np.argwhere(head_exists(self, products.shape[1:])).tolist():
            column = products[:, layer, head]
            text = index_of_largest(column)
            if text is None:
                yield layer, head, None, None, None, None, None, None, 0
                continue
            value = float(column[text])
            headroom = float(np.log2(FP16_MAX / value)) if value > 0 else None
            yield (
                layer, head, value, headroom, int(value > FP16_MAX), self.per_text.texts[text],
                int(queries[text, layer, head]), int(keys[text, layer, head]), int((~np.isnan(column)).sum()),
            )  # fmt: skip

    def _warn_of_overflow(self, rows: Sequence[TableRow]) -> None:
        for layer, heads in _overflowing(rows).items():
            largest = max(float(row[2]) for row in rows if row[0] == layer and row[2] is not None)
            self.warn(
                f"layer {layer} {_name_heads(heads)} would overflow in fp16: |q·k| up to {largest:,.0f}, more than "
                "its largest number, 65,504"
            )

    def _summary(self, rows: Sequence[TableRow]) -> TableRow:
        names = ("cosine", "cosine_null", "key_bias", "key_norm", "value_norm")
        means = [mean_or_none(self.values(name)) for name in names]
        products = [float(row[2]) for row in rows if row[2] is not None]
        headrooms = [float(row[3]) for row in rows if row[3] is not None]
        overflows = "; ".join(
            f"layer {layer} {_name_heads(heads)}" for layer, heads in _overflowing(rows).items()
        )
        return (
            *means,
            max(products) if products else None,
            min(headrooms) if headrooms else None,
            overflows or "none",
            self.n_texts("largest"),
        )


def _norm_ratio(states: Tensor, position: int) -> Tensor:
    """Return the norm at `position` over the median norm of states [pos, head, d_head], [head], float64; NaN for a
    median of 0."""
    import torch

    from phaselens.spectrum import median, row_norms

    norms = row_norms(states.flatten(0, 1)).view(states.shape[:2]).cpu()
    medians = torch.tensor([median(column) for column in norms.T], dtype=torch.float64)
    return torch.where(medians > 0, norms[position] / medians, torch.nan)


def _overflowing(rows: Sequence[TableRow]) -> dict[int, list[int]]:
    """Return the heads that overflow, by layer."""
    heads: dict[int, list[int]] = {}
    for row in rows:
        if row[4] == 1:
            heads.setdefault(int(row[0] or 0), []).append(int(row[1] or 0))
    return heads


def _name_heads(heads: Sequence[int]) -> str:
    """Return `head 7`, or `heads 3, 7`."""
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [QkGeometry]
