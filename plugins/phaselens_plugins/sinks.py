"""Attention sinks: how much attention the heads of each layer put on one position, by default the first.

Gu et al. 2024 (arXiv:2410.10781), section 3, with two choices made explicit: whether query 0 counts,
which can only attend to itself, and whether the threshold is applied to each text or to the mean over
texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    TOO_FEW_TEXTS,
    Display,
    FigurePanel,
    LayerView,
    Metric,
    Params,
    Table,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._common import (
    STUDY,
    TableRow,
    head_exists,
    mean_intervals,
    mean_or_none,
    most_frequent,
    null_means,
    quoted_ids,
    repeated_over_heads,
    rows_by_head,
    rows_by_text,
)
from phaselens_plugins._sink_tables import SHARE, SINK_TABLES
from phaselens_plugins._strongest import MIN_QUERIES, strongest_position, uniform_scores

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SinkParams(Params):
    """Parameters of the metric: the threshold, what is averaged, and which key is measured."""

    threshold: float = param(
        0.3, help="a head whose score is at least this is a sink", unit=SHARE, minimum=0, maximum=1
    )
    include_query0: bool = param(False, help="rates, means and intervals use score_all, which counts query 0")
    order: str = param(
        "threshold_then_mean",
        help="threshold each text and take the mean over texts, or the reverse",
        choices=("threshold_then_mean", "mean_then_threshold"),
    )
    sink_position: int = param(
        0, help="the key whose share of attention is measured", unit="position", minimum=0
    )
    strongest: bool = param(
        True, help="also find the strongest position other than 0 (one more kernel call per layer)"
    )
    min_queries: int = param(
        MIN_QUERIES,
        help="keys that fewer queries see (or, in short texts and windows, fewer than half of those that see key 1) "
        "cannot be the strongest",
        unit="queries",
        minimum=1,
    )


class Sinks(Metric[SinkParams]):
    """Metric of sink scores by text, layer and head, and of sink rates by layer, with nulls."""

    name = "sinks"
    version = "2"
    title = "attention sinks"
    description = "share of heads that put at least a threshold of their attention on one position"
    citation = "Gu et al. 2024, arXiv:2410.10781"
    Params = SinkParams
    tables = SINK_TABLES
    display = Display(
        value="sink_rate",
        title="sink rate",
        low="ci_low",
        high="ci_high",
        null="null_rate",
        percent=True,
        strong=0.5,
        strong_means="sink-heavy: half of the heads or more, and more than the null",
        summary=(("sink_rate", "average"), ("mean_score", "mean score")),
        by_head="score",
    )
    figure_panels = (
        FigurePanel(
            STUDY,
            "sink-rate",
            Display("sink_rate", "sink rate", low="ci_low", high="ci_high", null="null_rate", percent=True),
        ),
    )

    @property
    def sink_position(self) -> int:
        """The key whose share of attention `hook_sink` has."""
        return self.params.sink_position

    @classmethod
    def define(cls, params: SinkParams) -> str:
        """State the definition, for instance: share of heads with score ≥ 0.3 on position 0, query 0 excluded; …"""
        query0 = "included" if params.include_query0 else "excluded"
        order = {
            "threshold_then_mean": "threshold, then mean over texts",
            "mean_then_threshold": "mean over texts, then threshold",
        }[params.order]
        return (
            f"share of heads with score ≥ {params.threshold:g} on position {params.sink_position}, "
            f"query 0 {query0}; {order}"
        )

    def hooks(self) -> Sequence[str]:
        """Return the point `hook_sink`, and `hook_received` for the strongest position."""
        received = ["blocks.{layer}.attn.hook_received"] if self.params.strongest else []
        learned = [in_layer(layer, "attn.hook_learned_sink") for layer in self.model.learned_sinks]
        return ["blocks.{layer}.attn.hook_sink", *received, *learned]

    def update(self, layer: LayerView) -> None:
        """Compute the scores of this layer for the texts of the batch."""
        from phaselens.attention import query_mean, sink_score

        sink, key = layer.float64("attn.hook_sink"), self.params.sink_position
        sink = sink.masked_fill(sink.isinf(), float("nan"))
        lengths, window = layer.batch.lengths_on(sink.device), self.model.windows[layer.index or 0]
        score, score_all = (
            sink_score(sink, lengths, include_query0=include, position=key, window=window)
            for include in (False, True)
        )
        self.per_text.add(layer, score=score, score_all=score_all)
        if "attn.hook_learned_sink" in layer:
            learned = query_mean(layer.float64("attn.hook_learned_sink"), lengths, first=self._first_query)
            self.per_text.add(layer, learned=learned)
        if self.params.strongest:
            position, strength = strongest_position(
                layer.float64("attn.hook_received"), lengths, window, self.params.min_queries
            )
            self.per_text.add(layer, position=position, strength=strength)

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        score, score_all = self.per_text.stack("score"), self.per_text.stack("score_all")
        null, null_all = self._null(include_query0=False), self._null(include_query0=True)
        self._explain(score)
        chosen_score, chosen_null = (score_all, null_all) if self.params.include_query0 else (score, null)
        order = self.per_text.by_content
        learned, learned_null = self._learned(score.shape), self._learned_null()
        columns = [score, score_all, null, null_all, learned, learned_null]
        tables = {
            "texts": self.table("texts", rows_by_text(self, columns)),
            "heads": self._heads(chosen_score, chosen_null, learned, learned_null),
            **self._rates(chosen_score[order], chosen_null[order], learned[order]),
        }
        return tables | (self._strongest() if self.params.strongest else {})

    @property
    def _first_query(self) -> int:
        """The first query that means over all queries count."""
        return 0 if self.params.include_query0 else 1

    def _learned(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the attention on learned sink logits [text, layer, head]; 0 in a layer without them."""
        import numpy as np

        learned = np.zeros(shape)
        if self.per_text.layers("learned"):
            measured = self.per_text.stack("learned")
            layers = list(self.model.learned_sinks)
            learned[:, layers] = measured[:, layers]
        learned[np.array(self.per_text.lengths) <= self._first_query] = np.nan
        learned[:, ~self._has_attention()] = np.nan
        learned[:, ~head_exists(self, shape[1:])] = np.nan
        return learned

    def _learned_null(self) -> np.ndarray:
        """Return the attention on a sink logit if it and all keys that a query sees had the same, [text, layer]."""
        import numpy as np

        from phaselens.attention import uniform_learned_sink

        rows = [
            [
                uniform_learned_sink(length, self.params.include_query0, window)
                if layer in self.model.learned_sinks
                else 0.0
                for layer, window in enumerate(self.model.windows)
            ]
            for length in self.per_text.lengths
        ]
        return np.array(rows, dtype=np.float64)

    def _null(self, *, include_query0: bool) -> np.ndarray:
        """Return the scores of uniform attention, [text, layer]; NaN where no query counts."""
        import numpy as np

        from phaselens.attention import uniform_sink

        position = self.params.sink_position
        rows = [
            [uniform_sink(length, include_query0, position, window) for window in self.model.windows]
            for length in self.per_text.lengths
        ]
        return np.array(rows, dtype=np.float64)

    def _is_unseen(self) -> np.ndarray:
        """Return whether only query 0 sees the key, bool [layer]."""
        import numpy as np

        return np.array([window == 1 and not self.params.sink_position for window in self.model.windows])

    def _has_attention(self) -> np.ndarray:
        """Return whether the layer has attention, bool [layer]."""
        import numpy as np

        return np.isin(np.arange(self.model.n_layers), self.model.attention_layers)

    def _explain(self, score: np.ndarray) -> None:
        """Warn of missing scores, with the reason."""
        import numpy as np

        text_ids, first_query = self.per_text.texts, max(self.params.sink_position, 1)
        is_short = np.array(self.per_text.lengths) <= first_query
        if is_short.any():
            min_length = "two tokens" if first_query == 1 else f"{first_query + 1} tokens"
            self.warn(f"score is missing: fewer than {min_length} in text {quoted_ids(text_ids, is_short)}")
        is_unseen = self._is_unseen()
        if is_unseen.any():
            layers = ", ".join(map(str, np.flatnonzero(is_unseen)))
            self.warn(f"score is missing in layer {layers}: with a window of 1, only query 0 sees position 0")
        is_missing = np.isnan(score) & ~is_short[:, None, None] & ~is_unseen[:, None]
        has_head = head_exists(self, score.shape[1:])
        is_missing &= self._has_attention()[:, None] & has_head
        if is_missing.any():
            layers = ", ".join(str(layer) for layer in np.flatnonzero(is_missing.any((0, 2))))
            self.warn(
                f"score is missing, and rates leave the text out: attention is NaN or infinite in layer {layers}"
                f" ({int(is_missing.sum())} heads) for text {quoted_ids(text_ids, is_missing.any((1, 2)))}"
            )
        if self.params.strongest:
            is_unknown = np.isnan(self.per_text.stack("position")) & (~np.isnan(score) | is_unseen[:, None])
            is_unknown &= ~is_short[:, None, None] & self._has_attention()[:, None] & has_head
            if is_unknown.any():
                ids = quoted_ids(text_ids, is_unknown.any((1, 2)))
                self.warn(f"the strongest position is missing: attention is NaN or infinite for text {ids}")

    def _heads(
        self, score: np.ndarray, null: np.ndarray, learned: np.ndarray, learned_null: np.ndarray
    ) -> Table:
        import numpy as np

        present = ~np.isnan(score)
        columns = []
        for values, nulls in ((score, null), (learned, learned_null)):
            means = null_means(self, repeated_over_heads(nulls, score.shape), where=~np.isnan(values))
            columns += [*mean_intervals(self, values), means]
        columns.append(present.sum(0))
        return self.table("heads", rows_by_head(self, columns))

    def _rates(self, score: np.ndarray, null: np.ndarray, learned: np.ndarray) -> dict[str, Table]:
        """Return the tables `layers` and `summary`. A text counts for a layer if all its heads have a score."""
        import numpy as np

        has_head = head_exists(self, score.shape[1:])
        is_complete = ~(np.isnan(score) & has_head).any(-1)
        rows = []
        for layer in range(score.shape[1]):
            texts = is_complete[:, layer]
            rate, low, high = self._rate(score[texts, layer][:, has_head[layer]])
            null_rate, _, _ = self._rate(null[texts, layer, None])
            means = [mean_or_none(values[texts, layer]) for values in (score, learned)]
            rows.append((layer, rate, low, high, null_rate, *means))
        scored_layers = (~self._is_unseen() | self.params.include_query0) & self._has_attention()
        scored_texts = is_complete[:, scored_layers].all(1) & bool(scored_layers.any())
        n_texts = int(scored_texts.sum())
        by_cell = score[scored_texts][:, scored_layers[:, None] & has_head]
        learned_mean = mean_or_none(learned[scored_texts][:, scored_layers])
        summary = (self._rate(by_cell)[0], mean_or_none(by_cell), learned_mean, n_texts)
        if n_texts == 1:
            self.warn("fewer than 2 texts with a score: intervals are missing", TOO_FEW_TEXTS)
        return {"layers": self.table("layers", rows), "summary": self.table("summary", [summary])}

    def _rate(self, score: np.ndarray) -> tuple[float | None, float | None, float | None]:
        """Return rate, low and high of score [text, cell] in the chosen order; None where missing."""
        from phaselens.uncertainty import mean_interval

        threshold = self.params.threshold
        if self.params.order == "threshold_then_mean":
            interval = mean_interval((score >= threshold).mean(1), seed=self.seed)
        else:
            interval = mean_interval(
                score, transform=lambda mean: (mean >= threshold).mean(-1), seed=self.seed
            )
        rate, low, high = (bound.tolist() for bound in interval)
        return rate, low, high

    def _strongest(self) -> dict[str, Table]:
        """Return the tables `strongest` and `positions`."""
        import numpy as np

        position, score = self.per_text.stack("position"), self.per_text.stack("strength")
        null = np.full_like(score, np.nan)
        for text, layer, head in np.argwhere(~np.isnan(position)):
            length, key = self.per_text.lengths[text], int(position[text, layer, head])
            null[text, layer, head] = uniform_scores(length, self.model.windows[layer])[key]
        by_text = rows_by_text(self, [position, score, null], with_lengths=False)
        by_head: list[TableRow] = []
        for layer, head in np.argwhere(head_exists(self, position.shape[1:])).tolist():
            present = ~np.isnan(position[:, layer, head])
            n_texts = int(present.sum())
            if not n_texts:
                by_head.append((layer, head, None, None, None, None, 0))
                continue
            key, share = most_frequent(position[present, layer, head])
            means = (mean_or_none(array[present, layer, head]) for array in (score, null))
            by_head.append((layer, head, key, share, *means, n_texts))
        return {"strongest": self.table("strongest", by_text), "positions": self.table("positions", by_head)}


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Sinks]
