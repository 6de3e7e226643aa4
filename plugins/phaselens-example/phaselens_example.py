"""Sinks on delimiters: the attention that the first delimiters of a text receive, next to that under uniform attention.

Sun et al. 2024 (arXiv:2402.17762), section 2, find massive activations, which accompany attention sinks, at the first
token and at the first delimiter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    interval_columns,
    mean_intervals,
    param,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SHARE = "share of attention"


def delimiter_positions(words: Sequence[str], delimiters: str, count: int) -> list[int]:
    r"""Return the positions of the first `count` delimiters after position 0. A tokenizer's space marks are ignored.

    >>> delimiter_positions(["<s>", "Call", "Ġme", ",", "Ġsir", "."], ".,", 1)
    [3]
    """
    spaces = {"Ġ": "", "▁": "", "Ċ": "\n"}
    plain = ["".join(spaces.get(sign, sign) for sign in word) for word in words]
    positions = [position for position, word in enumerate(plain) if position and word and set(word) <= set(delimiters)]
    return positions[:count]


def mean_score(received: Tensor, positions: Sequence[int], length: int, window: int | None = None) -> Tensor:
    """Return the mean score [head] of keys, from received [head, key], attention summed over the queries of one text.

    A key's score is the attention that it receives divided by the number of queries that see it, which a sliding
    `window` limits. The mean is over `positions`; NaN without positions.

    >>> import torch
    >>> mean_score(torch.tensor([[2.0, 0.8, 0.2]]), [1], 3)
    tensor([0.4000])
    """
    import torch

    if not positions:
        return torch.full(received.shape[:1], math.nan, dtype=received.dtype, device=received.device)
    keys = torch.tensor(list(positions), device=received.device)
    n_queries = (length - keys).clamp(max=length if window is None else window)
    return (received[:, keys] / n_queries).mean(-1)


def uniform_score(positions: Sequence[int], length: int, window: int | None = None) -> float:
    """Return the mean score if every query spread its attention evenly over the keys that it sees.

    >>> round(uniform_score([1], 3), 4)  # 1/2 from query 1, 1/3 from query 2
    0.4167
    """
    if not positions:
        return math.nan
    scores = []
    for key in positions:
        last = length if window is None else min(length, key + window)
        received = sum(1 / (query + 1 if window is None else min(query + 1, window)) for query in range(key, last))
        scores.append(received / (last - key))
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class DelimiterParams(Params):
    """Parameters of the metric."""

    delimiters: str = param(".,;:!?\n", help="characters that a delimiter token consists of")
    count: int = param(1, help="number of delimiters per text that count, from its beginning", unit="tokens", minimum=1)


class DelimiterSinks(Metric[DelimiterParams]):
    """Metric of the attention received by a text's first delimiters, by layer."""

    name = "delimiter-sinks"
    version = "1"
    title = "sinks on delimiters"
    description = "share of attention that the first delimiters after position 0 receive"
    citation = "Sun et al. 2024, arXiv:2402.17762"
    Params = DelimiterParams
    tables = (
        TableSpec(
            "texts",
            (
                Column("text", str, None, "the text's id"),
                Column("layer", int, "index", "0-based"),
                Column("head", int, "index", "0-based"),
                Column("score", float, SHARE, "over the queries that see the delimiter; mean over delimiters"),
                Column("null", float, SHARE, "score under uniform attention"),
                Column("n_delimiters", int, "tokens", "delimiters that counted"),
            ),
            "one row per text, layer and head",
        ),
        TableSpec(
            "layers",
            (
                Column("layer", int, "index", "0-based"),
                Column("score", float, SHARE, "mean over texts and heads"),
                *interval_columns(SHARE),
                Column("null", float, SHARE, "score under uniform attention"),
                Column("strongest", float, SHARE, "the head with the highest mean over texts"),
            ),
            "one row per layer",
        ),
        TableSpec(
            "summary",
            (
                Column("score", float, SHARE, "mean over texts, layers and heads"),
                Column("n_texts", int, "texts", "texts with a delimiter"),
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="score",
        title="delimiter",
        low="ci_low",
        high="ci_high",
        null="null",
        percent=True,
        also=(("strongest", "top head"),),
        summary=(("score", "average"),),
    )

    def hooks(self) -> Sequence[str]:
        """Return the point of the attention that each key receives, which needs no attention matrix."""
        return ["blocks.{layer}.attn.hook_received"]

    def update(self, layer: LayerView) -> None:
        """Store the scores of this layer for the texts of the batch."""
        import torch

        received, batch = layer.float64("attn.hook_received"), layer.batch
        window = self.model.windows[layer.index or 0]
        scores, nulls, counts = [], [], []
        for row, (tokens, length) in enumerate(zip(batch.tokens, batch.lengths, strict=True)):
            words = [batch.token_name(token) for token in tokens[:length].tolist()]
            positions = delimiter_positions(words, self.params.delimiters, self.params.count)
            scores.append(mean_score(received[row], positions, length, window))
            nulls.append(uniform_score(positions, length, window))
            counts.append(len(positions))
        self.per_text.add(
            layer,
            score=torch.stack(scores),
            null=torch.tensor(nulls, dtype=torch.float64),
            count=torch.tensor(counts, dtype=torch.float64),
        )

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        import numpy as np

        score, null = self.per_text.stack("score"), self.per_text.stack("null")
        count, text_ids = self.per_text.stack("count"), self.per_text.texts
        present = ~np.isnan(score).any((1, 2))
        for text, is_present in zip(text_ids, present, strict=True):
            if not is_present:
                self.warn(
                    f"score is missing: text {text!r} has no delimiter after position 0, or attention is not finite"
                )
        rows = [
            (
                text_ids[text],
                layer,
                head,
                _cell(score[text, layer, head]),
                _cell(null[text, layer]),
                count[text, layer],
            )
            for text, layer, head in np.ndindex(score.shape)
        ]
        mean = float(score[present].mean()) if present.any() else None
        return {
            "texts": self.table("texts", rows),
            "layers": self.table("layers", self._layers(score, null, present)),
            "summary": self.table("summary", [(mean, present.sum())]),
        }

    def _layers(self, score: np.ndarray, null: np.ndarray, present: np.ndarray) -> list[tuple[Any, ...]]:
        """Return the rows of `layers` from score [text, layer, head], null [text, layer] and present [text]."""
        import numpy as np

        if not present.any():
            return [(layer, None, None, None, None, None) for layer in range(score.shape[1])]
        over_heads = np.where(present[:, None], score.mean(-1), np.nan)
        columns = mean_intervals(self, over_heads)
        columns.append(null[present].mean(0).tolist())
        columns.append(score[present].mean(0).max(-1).tolist())
        return [(layer, *row) for layer, row in enumerate(zip(*columns, strict=True))]


def _cell(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics of this package."""
    return [DelimiterSinks]
