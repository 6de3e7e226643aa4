"""Spread of attention: entropy of its rows, mass near the diagonal, concentration of what keys receive.

A query sees the keys up to its own; in a layer with a sliding window of w keys, only the last w of them. Every mean is
over the queries that see the keys in question. A sink logit is not a key: weights are those that the model uses, so
the rows of a layer with sink logits sum to less than 1.

No query × key matrix is built. Heads are classified in two ways: by tests that do not overlap, and as in a published
study, whose "local" mass includes position 0 and whose entropy is that of the last row over T.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
    Numbers,
    TableRow,
    head_exists,
    interval_columns,
    mean_intervals,
    mean_or_none,
    mean_over_texts,
    none_if_nan,
    null_means,
    rows_by_index,
    store_by_text,
)
from phaselens_plugins._gates import GATE, gate_points, has_other_step, mean_gates
from phaselens_plugins._layer_metric import (
    NO_PROBLEM,
    NOT_FINITE,
    SHORT,
    LayerMetric,
    Quantity,
    layer_tables,
    missing_record,
)
from phaselens_plugins._uniform_patterns import uniform_pattern

if TYPE_CHECKING:
    from torch import Tensor

SHARE = "share of attention"
UNIFORM = "uniform attention"
POINTS = ("hook_entropy", "hook_sink", "hook_received", "hook_distance")
QUANTITIES = (
    Quantity("entropy", "nats",
             "−Σ p ln p of a query's weights on keys, mean over all queries, the first (0) included; a sink logit's "
             "share is left out, not spread over the keys", UNIFORM),
    Quantity("entropy_normalised", "share of maximum",
             "entropy over ln(keys seen), mean over queries that see two or more; a sink logit is not a key",
             UNIFORM),
    Quantity("concentration", "0 to 1",
             "1 + Σ c ln c / ln T of the shares c of all T queries' attention that keys receive; 1 also where a "
             "sink logit takes all", UNIFORM),
    Quantity("sink", SHARE, "on position 0, mean over the queries ≥ 1 that see it", UNIFORM),
    Quantity("local", SHARE, "on the keys just before the query, position 0 left out, mean over queries ≥ 1", UNIFORM),
    Quantity("itself", SHARE, "on the query's own position, mean over queries ≥ 1", UNIFORM),
    Quantity("local_with_bos", SHARE, "as local, with position 0 counted if it is among these keys", UNIFORM),
    GATE,
)  # fmt: skip
CLASSES = ("sink", "local", "distributed", "mixed")


@dataclass(frozen=True)
class PatternParams(Params):
    """Widths of the neighbourhood and the profile, and thresholds of the classes."""

    local_width: int = param(5, help="keys before the query that count as local", unit="keys", minimum=1)
    distances: int = param(
        64, help="distances 0 … n − 1 of the profile", unit="keys", minimum=1, maximum=4096
    )
    sink_threshold: float = param(
        0.3, help="a sink head's mass on position 0", unit=SHARE, minimum=0, maximum=1
    )
    local_threshold: float = param(0.3, help="a local head's local mass", unit=SHARE, minimum=0, maximum=1)
    distributed_threshold: float = param(
        0.7, help="a distributed head's normalised entropy", unit="share of maximum", minimum=0, maximum=1
    )


class HeadClass(NamedTuple):
    """A row of the table `classes`."""

    layer: int
    head: int
    head_class: str | None = None
    study_class: str | None = None
    sink: float | None = None
    local: float | None = None
    local_with_bos: float | None = None
    entropy_normalised: float | None = None
    entropy_last: float | None = None
    null: str | None = None


class AttentionPatterns(LayerMetric[PatternParams]):
    """Metric of entropy, concentration, local mass and class of every head, and of attention by distance."""

    name = "attention-patterns"
    version = "2"
    title = "attention patterns"
    description = "entropy of attention, mass near the diagonal, classes of heads, attention by distance"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477 (mixing score, ColSum concentration)"
    Params = PatternParams
    quantities = QUANTITIES
    tables = (
        *layer_tables(QUANTITIES, heads=True),
        TableSpec(
            "classes",
            (
                LAYER,
                HEAD,
                Column("class", str, None, "sink, local, distributed or mixed: the first whose test is met"),
                Column(
                    "class_study", str, None, "as the study assigns it: see entropy_last and local_with_bos"
                ),
                Column("sink", float, SHARE, "mean over texts"),
                Column("local", float, SHARE, "mean over texts, position 0 left out"),
                Column("local_with_bos", float, SHARE, "mean over texts, position 0 counted"),
                Column("entropy_normalised", float, "share of maximum", "mean over texts"),
                Column(
                    "entropy_last", float, "nats", "entropy of the last query over T, the study's entropy"
                ),
                Column("null", str, None, "class of uniform attention at these lengths"),
            ),
            "class of each head, by its means over texts",
        ),
        TableSpec(
            "class_counts",
            (
                LAYER,
                *(Column(name, int, "heads", "overlap removed") for name in CLASSES),
                *(Column(f"{name}_study", int, "heads", "as the study assigns it") for name in CLASSES),
            ),
            "heads of each class by layer",
        ),
        TableSpec(
            "profile",
            (
                LAYER,
                Column("distance", int, "keys", "0 is the query's own position"),
                Column("attention", float, SHARE, "mean over queries that see such a key, heads and texts"),
                *interval_columns(SHARE),
                Column("null", float, SHARE, UNIFORM),
                N_TEXTS,
            ),
            "attention by distance; missing where no text is that long, and beyond the layer's window",
        ),
        TableSpec(
            "summary",
            (
                Column("entropy", float, "nats", "mean over texts, layers and heads"),
                Column("entropy_normalised", float, "share of maximum", "mean over texts, layers and heads"),
                Column("concentration", float, "0 to 1", "mean over texts, layers and heads"),
                *(Column(f"{name}_heads", float, "share of heads", "overlap removed") for name in CLASSES),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="entropy_normalised",
        title="entropy",
        low="entropy_normalised_low",
        high="entropy_normalised_high",
        null="entropy_normalised_null",
        also=(("local", "local"),),
        summary=(
            ("entropy", "nats"),
            ("sink_heads", "sink"),
            ("local_heads", "local"),
            ("distributed_heads", "distrib."),
            ("mixed_heads", "mixed"),
        ),
        by_head="entropy_normalised",
    )

    @classmethod
    def define(cls, params: PatternParams) -> str:
        """State the entropy's normalisation, the neighbourhood and the thresholds of the classes."""
        return (
            "entropy over ln(keys seen: those up to the query, within the layer's window), mean over queries that see "
            f"two or more; local: {params.local_width} keys before the query, itself and BOS left out; classes, first "
            f"met: sink ≥ {params.sink_threshold:g}, local ≥ {params.local_threshold:g}, "
            f"entropy ≥ {params.distributed_threshold:g}, else mixed"
        )

    def hooks(self) -> Sequence[str]:
        """Return the points of row entropy, received mass, mass on position 0, mass by distance, and gates."""
        return [*(in_layer("{layer}", f"attn.{point}") for point in POINTS), *gate_points(self.model)]

    @property
    def n_distances(self) -> int:
        """Distances that the profile and the neighbourhood need."""
        return max(self.params.distances, self.params.local_width + 1)

    def update(self, layer: LayerView) -> None:
        """Measure the patterns of this layer for the texts of the batch."""
        entropy, sink, received, profile = (layer.float64(f"attn.{point}") for point in POINTS)
        index, gates = layer.index or 0, mean_gates(layer, self.model)
        records = [
            self._measure(index, entropy[row, :, :n], sink[row, :, :n], received[row, :, :n], profile[row])
            for row, n in enumerate(layer.batch.lengths)
        ]
        for record, gate in zip(records, gates, strict=True):
            record |= {"gate": gate.tolist(), "gate_null": 1.0}
        store_by_text(self, layer, records)

    def _measure(
        self, index: int, entropy: Tensor, sink: Tensor, received: Tensor, profile: Tensor
    ) -> dict[str, Numbers]:
        """Measure one text: entropy, sink, received [head, pos] and profile [head, distance] (sums over queries)."""
        import torch

        from phaselens.attention import concentration, normalised_entropy, sink_score

        n_heads, n = entropy.shape
        width, window = self.params.local_width, self.model.windows[index]
        is_finite = all(bool(tensor.isfinite().all()) for tensor in (entropy, sink, received, profile))
        if n < 2 or not is_finite:
            return _missing_record(SHORT if n < 2 else NOT_FINITE, n_heads, self.params.distances)
        normalised = normalised_entropy(entropy, window=window)
        local_with_bos = profile[:, 1 : width + 1].sum(-1) / (n - 1)
        bos_in_local = sink[:, 1 : width + 1].sum(-1) / (n - 1)
        lengths = torch.tensor([n])
        heads = {
            "entropy": entropy.mean(-1),
            # A window of 1 leaves a query no choice, so there is no entropy to normalise.
            "entropy_normalised": normalised[:, ~normalised[0].isnan()].mean(-1),
            "concentration": concentration(received[None], lengths)[0],
            "sink": sink_score(sink[None], lengths, window=window)[0],
            "local": local_with_bos - bos_in_local,
            # Query 0 is left out: its weight on its own key is 1, or less with a sink logit.
            "itself": (profile[:, 0] - sink[:, 0]) / (n - 1),
            "local_with_bos": local_with_bos,
            "entropy_last": entropy[:, -1] / n,
        }
        n_distances = profile.shape[1]
        counts = torch.arange(n, n - n_distances, -1, device=entropy.device).clamp(min=0)
        counts[window or n :] = 0
        null = uniform_pattern(n, window, width)
        profile_sums = torch.nn.functional.pad(null["profile"], (0, n_distances))[:n_distances]
        mean_profile = torch.where(counts > 0, profile.mean(0) / counts, torch.nan)
        null_profile = torch.where(counts.cpu() > 0, profile_sums / counts.cpu(), torch.nan)
        return {
            **{name: values.tolist() for name, values in heads.items()},
            **{f"{name}_null": float(null[name]) for name in null if name != "profile"},
            "profile": mean_profile[: self.params.distances].tolist(),
            "profile_null": null_profile[: self.params.distances].tolist(),
            "problem": NO_PROBLEM,
        }

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.explain("entropy")
        self._explain_layers()
        classes = list(self._classes())
        return {
            "texts": self.texts_table(),
            "layers": self.layers_table(),
            "heads": self.heads_table(),
            "classes": self.table("classes", classes),
            "class_counts": self.table("class_counts", self._counts(classes)),
            "profile": self.table("profile", self._profile()),
            "summary": self.table("summary", [self._summary(classes)]),
        }

    def _explain_layers(self) -> None:
        """Warn of the values that are missing in layers with a window of 1, or with another step than a gate."""
        single = [str(layer) for layer, window in enumerate(self.model.windows) if window == 1]
        if single:
            self.warn(
                f"sink, entropy_normalised and class are missing in layer {', '.join(single)}: with a window of 1, a "
                "query sees itself only"
            )
        ungated = [str(layer) for layer in self.model.attention_layers if has_other_step(self.model, layer)]
        if ungated:
            self.warn(
                f"gate is missing in layer {', '.join(ungated)}: what follows the heads there is not a gate but a norm "
                "or another operation"
            )

    def _classes(self) -> Iterator[HeadClass]:
        import numpy as np

        names = ("sink", "local", "local_with_bos", "entropy_normalised", "entropy_last")
        means = {name: mean_over_texts(self.values(name)) for name in names}
        nulls = {name: mean_over_texts(self.values(f"{name}_null")) for name in ("sink", "local")}
        exists = head_exists(self, means["sink"].shape)
        for layer, head in np.argwhere(exists).tolist():
            sink, local, local_with_bos, entropy, entropy_last = (
                float(means[name][layer, head]) for name in names
            )
            if sink != sink:
                yield HeadClass(layer, head)
                continue
            is_distributed = entropy >= self.params.distributed_threshold
            layer_median = float(np.median(means["entropy_last"][layer][exists[layer]]))
            yield HeadClass(
                layer,
                head,
                self._class(sink, local, is_distributed),
                self._class(sink, local_with_bos, entropy_last > layer_median),
                none_if_nan(sink),
                none_if_nan(local),
                none_if_nan(local_with_bos),
                none_if_nan(entropy),
                none_if_nan(entropy_last),
                self._class(float(nulls["sink"][layer]), float(nulls["local"][layer]), True),
            )

    def _class(self, sink: float, local: float, is_distributed: bool) -> str:
        if sink >= self.params.sink_threshold:
            return "sink"
        if local >= self.params.local_threshold:
            return "local"
        return "distributed" if is_distributed else "mixed"

    def _counts(self, classes: Sequence[HeadClass]) -> Iterator[TableRow]:
        for layer in sorted({row.layer for row in classes}):
            in_layer = [row for row in classes if row.layer == layer]
            if in_layer[0].head_class is None:
                yield layer, *([None] * 2 * len(CLASSES))
                continue
            for_metric = [row.head_class for row in in_layer]
            for_study = [row.study_class for row in in_layer]
            yield layer, *map(for_metric.count, CLASSES), *map(for_study.count, CLASSES)

    def _profile(self) -> Iterator[TableRow]:
        import numpy as np

        profile = self.per_text.stack("profile")
        present = ~np.isnan(profile)
        nulls = null_means(self, self.per_text.stack("profile_null"), where=present)
        return rows_by_index([*mean_intervals(self, profile), nulls, present.sum(0)])

    def _summary(self, classes: Sequence[HeadClass]) -> TableRow:
        head_classes = [row.head_class for row in classes if row.head_class is not None]
        n_heads = len(head_classes)
        return (
            *(mean_or_none(self.values(name)) for name in ("entropy", "entropy_normalised", "concentration")),
            *(head_classes.count(name) / n_heads if n_heads else None for name in CLASSES),
            self.n_texts("entropy"),
        )


def _missing_record(problem: int, n_heads: int, n_distances: int) -> dict[str, Numbers]:
    missing = float("nan")
    names = [*(quantity.name for quantity in QUANTITIES), "entropy_last"]
    return {
        **missing_record(QUANTITIES, problem),
        **dict.fromkeys(names, [missing] * n_heads),
        **dict.fromkeys(("profile", "profile_null"), [missing] * n_distances),
    }


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [AttentionPatterns]
