"""Attention sinks: how much attention the heads of each layer put on one position, by default the first.

Gu et al. 2024 (arXiv:2410.10781), section 3, with two choices made explicit: whether query 0 counts,
which can only attend to itself, and whether the threshold is applied to each text or to the mean over
texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Params, Table, TableSpec, hookimpl, param
from phaselens_plugins._common import (
    HEAD,
    LAYER,
    N_TEXTS,
    N_TOKENS,
    TEXT,
    cell,
    interval_columns,
    intervals,
    some,
)
from phaselens_plugins._strongest import MIN_QUERIES, strongest_position, uniform_scores

if TYPE_CHECKING:
    import numpy as np

SHARE = "share of attention"


@dataclass(frozen=True)
class SinkParams(Params):
    """What the metric can be asked for."""

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
        True, help="also find the strongest position other than 0 (one more kernel call a layer)"
    )
    min_queries: int = param(
        MIN_QUERIES,
        help="keys that fewer queries see (or, in short texts and windows, fewer than half of those that see key 1) "
        "cannot be the strongest",
        unit="queries",
        minimum=1,
    )


class Sinks(Metric[SinkParams]):
    """Sink scores by text, layer and head; sink rates by layer; each with its null."""

    name = "sinks"
    version = "2"
    title = "attention sinks"
    description = "share of heads that put at least a threshold of their attention on one position"
    citation = "Gu et al. 2024, arXiv:2410.10781"
    Params = SinkParams
    tables = (
        TableSpec(
            "texts",
            (
                TEXT,
                LAYER,
                HEAD,
                Column(
                    "score",
                    float,
                    SHARE,
                    "mean over the queries that see the key (from it on, within the window), without query 0",
                ),
                Column("score_all", float, SHARE, "the same with query 0"),
                Column("null", float, SHARE, "score of uniform attention at this text's length and window"),
                Column("null_all", float, SHARE, "score_all of uniform attention, likewise"),
                N_TOKENS,
            ),
            "a row per text, layer and head",
        ),
        TableSpec(
            "heads",
            (
                LAYER,
                HEAD,
                Column("score", float, SHARE, "mean over texts"),
                *interval_columns(SHARE),
                Column("null", float, SHARE, "the same of uniform attention"),
                N_TEXTS,
            ),
            "a row per layer and head",
        ),
        TableSpec(
            "layers",
            (
                LAYER,
                Column("sink_rate", float, "share of heads", "heads whose score reaches the threshold"),
                *interval_columns("share of heads"),
                Column("null_rate", float, "share of heads", "the same if all attention were uniform"),
                Column("mean_score", float, SHARE, "mean over texts and heads"),
            ),
            "a row per layer",
        ),
        TableSpec(
            "summary",
            (
                Column("sink_rate", float, "share of heads", "mean over layers"),
                Column("mean_score", float, SHARE, "mean over texts, layers and heads"),
                N_TEXTS,
            ),
            "a row per model",
        ),
        TableSpec(
            "positions",
            (
                LAYER,
                HEAD,
                Column("position", int, "index", "the key other than 0 that is most often the strongest"),
                Column("share", float, "share of texts", "texts in which it is"),
                Column("score", float, SHARE, "score of each text's strongest such key, mean over texts"),
                Column("null", float, SHARE, "the same of uniform attention at the same keys"),
                N_TEXTS,
            ),
            "the strongest position other than 0, by layer and head",
        ),
        TableSpec(
            "strongest",
            (
                TEXT,
                LAYER,
                HEAD,
                Column(
                    "position",
                    int,
                    "index",
                    "the key other than 0 with the highest score, of those that `min_queries` see",
                ),
                Column(
                    "score",
                    float,
                    SHARE,
                    "what it receives, mean over the queries that see it, itself included",
                ),
                Column("null", float, SHARE, "score of uniform attention at this key"),
            ),
            "the strongest position other than 0, by text, layer and head",
        ),
    )
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

    @property
    def sink_position(self) -> int:
        """The key whose share `hook_sink` holds."""
        return self.params.sink_position

    @classmethod
    def define(cls, params: SinkParams) -> str:
        """For instance: share of heads with score ≥ 0.3 on position 0, query 0 excluded; …"""
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
        """`hook_sink`, and `hook_received` for the strongest position."""
        received = ["blocks.{layer}.attn.hook_received"] if self.params.strongest else []
        return ["blocks.{layer}.attn.hook_sink", *received]

    def update(self, layer: LayerView) -> None:
        """Scores of this layer for the texts of the batch."""
        from phaselens.attention import sink_score

        sink, key = layer.float64("attn.hook_sink"), self.params.sink_position
        sink = sink.masked_fill(sink.isinf(), float("nan"))
        lengths, window = layer.batch.lengths_on(sink.device), self.model.windows[layer.index or 0]
        score, score_all = (
            sink_score(sink, lengths, include_query0=include, position=key, window=window)
            for include in (False, True)
        )
        self.per_text.add(layer, score=score, score_all=score_all)
        if self.params.strongest:
            position, strength = strongest_position(
                layer.float64("attn.hook_received"), lengths, window, self.params.min_queries
            )
            self.per_text.add(layer, position=position, strength=strength)

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        score, score_all = self.per_text.stack("score"), self.per_text.stack("score_all")
        null, null_all = self._null(include_query0=False), self._null(include_query0=True)
        self._explain(score)
        used, used_null = (score_all, null_all) if self.params.include_query0 else (score, null)
        order = self.per_text.by_content
        result = {
            "texts": self._texts(score, score_all, null, null_all),
            "heads": self._heads(used, used_null),
            **self._rates(used[order], used_null[order]),
        }
        return result | (self._strongest() if self.params.strongest else {})

    def _null(self, *, include_query0: bool) -> np.ndarray:
        """Scores of uniform attention, [text, layer]; NaN where no query counts."""
        import numpy as np

        from phaselens.attention import uniform_sink

        position = self.params.sink_position
        rows = [
            [uniform_sink(length, include_query0, position, window) for window in self.model.windows]
            for length in self.per_text.lengths
        ]
        return np.array(rows, dtype=np.float64)

    def _unseen(self) -> np.ndarray:
        """Layers in which no query but 0 sees the key, bool [layer]."""
        import numpy as np

        return np.array([window == 1 and not self.params.sink_position for window in self.model.windows])

    def _explain(self, score: np.ndarray) -> None:
        """Say why scores are missing."""
        import numpy as np

        texts, first = self.per_text.texts, max(self.params.sink_position, 1)
        short = np.array(self.per_text.lengths) <= first
        if short.any():
            needed = "two tokens" if first == 1 else f"{first + 1} tokens"
            self.warn(f"score is null: fewer than {needed} in text {some(texts, short)}")
        unseen = self._unseen()
        if unseen.any():
            layers = ", ".join(map(str, np.flatnonzero(unseen)))
            self.warn(f"score is null in layer {layers}: with a window of 1, only query 0 sees position 0")
        missing = np.isnan(score) & ~short[:, None, None] & ~unseen[:, None]
        if missing.any():
            layers = ", ".join(str(layer) for layer in np.flatnonzero(missing.any((0, 2))))
            self.warn(
                f"score is null, and rates leave the text out: attention is NaN or infinite in layer {layers}"
                f" ({int(missing.sum())} heads) for text {some(texts, missing.any((1, 2)))}"
            )
        if self.params.strongest:
            unknown = np.isnan(self.per_text.stack("position")) & (~np.isnan(score) | unseen[:, None])
            unknown &= ~short[:, None, None]
            if unknown.any():
                named = some(texts, unknown.any((1, 2)))
                self.warn(f"the strongest position is null: attention is NaN or infinite for text {named}")

    def _texts(
        self, score: np.ndarray, score_all: np.ndarray, null: np.ndarray, null_all: np.ndarray
    ) -> Table:
        import numpy as np

        texts, lengths = self.per_text.texts, self.per_text.lengths
        columns = (
            score,
            score_all,
            *(np.broadcast_to(each[..., None], score.shape) for each in (null, null_all)),
        )
        return self.table(
            "texts",
            (
                (texts[at[0]], at[1], at[2], *(cell(column[at]) for column in columns), lengths[at[0]])
                for at in np.ndindex(score.shape)
            ),
        )

    def _heads(self, score: np.ndarray, null: np.ndarray) -> Table:
        import numpy as np

        present = ~np.isnan(score)
        nulls = np.broadcast_to(null[..., None], score.shape)
        base = intervals(self, nulls, where=present, n_resamples=1)[0]
        columns = [*intervals(self, score), base, present.sum(0).tolist()]
        return self.table(
            "heads",
            (
                (layer, head, *(column[layer][head] for column in columns))
                for layer in range(score.shape[1])
                for head in range(score.shape[2])
            ),
        )

    def _rates(self, score: np.ndarray, null: np.ndarray) -> dict[str, Table]:
        """`layers` and `summary`. A text counts for a layer if all heads of that layer have a score."""
        import numpy as np

        complete = ~np.isnan(score).any(-1)
        rows = []
        for layer in range(score.shape[1]):
            texts = complete[:, layer]
            rate, low, high = self._rate(score[texts, layer])
            null_rate, _, _ = self._rate(null[texts, layer, None])
            rows.append((layer, rate, low, high, null_rate, _mean(score[texts, layer])))
        scored = ~self._unseen() | self.params.include_query0
        whole = complete[:, scored].all(1) & bool(scored.any())
        flat = score[whole][:, scored].reshape(int(whole.sum()), int(scored.sum()) * score.shape[2])
        summary = (self._rate(flat)[0], _mean(flat), int(whole.sum()))
        if 0 < whole.sum() < 2:
            self.warn("fewer than 2 texts with a score: intervals are null")
        return {"layers": self.table("layers", rows), "summary": self.table("summary", [summary])}

    def _rate(self, score: np.ndarray) -> tuple[Any, Any, Any]:
        """(rate, low, high) of score [text, cell] in the chosen order; None where unknown."""
        from phaselens.uncertainty import mean_interval

        threshold = self.params.threshold
        if self.params.order == "threshold_then_mean":
            interval = mean_interval((score >= threshold).mean(1), seed=self.seed)
        else:
            interval = mean_interval(
                score, transform=lambda mean: (mean >= threshold).mean(-1), seed=self.seed
            )
        rate, low, high = (each.tolist() for each in interval)
        return rate, low, high

    def _strongest(self) -> dict[str, Table]:
        """`strongest` and `positions`."""
        import numpy as np

        position, score = self.per_text.stack("position"), self.per_text.stack("strength")
        null = np.full_like(score, np.nan)
        for text, layer, head in np.argwhere(~np.isnan(position)):
            length, key = self.per_text.lengths[text], int(position[text, layer, head])
            null[text, layer, head] = uniform_scores(length, self.model.windows[layer])[key]
        texts = self.per_text.texts
        by_text = [
            (texts[at[0]], at[1], at[2], cell(position[at]), cell(score[at]), cell(null[at]))
            for at in np.ndindex(position.shape)
        ]
        by_head: list[tuple[Any, ...]] = []
        for layer, head in np.ndindex(position.shape[1:]):
            there = ~np.isnan(position[:, layer, head])
            n_texts = int(there.sum())
            if not n_texts:
                by_head.append((layer, head, None, None, None, None, 0))
                continue
            keys, counts = np.unique(position[there, layer, head], return_counts=True)
            means = (_mean(each[there, layer, head]) for each in (score, null))
            by_head.append((layer, head, int(keys[counts.argmax()]), counts.max() / n_texts, *means, n_texts))
        return {"strongest": self.table("strongest", by_text), "positions": self.table("positions", by_head)}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [Sinks]
