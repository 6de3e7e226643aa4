"""Sinks on delimiters: how much attention the first delimiters of a text draw, next to what chance would give them.

Sun et al. 2024 (arXiv:2402.17762), section 2, find massive activations, which go with attention sinks, at the first
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
    interval_help,
    param,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SHARE = "share of attention"


def delimiter_positions(words: Sequence[str], delimiters: str, count: int) -> list[int]:
    r"""Where the first `count` delimiters stand, position 0 left out. A tokenizer's mark of a space does not count.

    >>> delimiter_positions(["<s>", "Call", "Ġme", ",", "Ġsir", "."], ".,", 1)
    [3]
    """
    spaces = {"Ġ": "", "▁": "", "Ċ": "\n"}
    plain = ["".join(spaces.get(sign, sign) for sign in word) for word in words]
    found = [place for place, word in enumerate(plain) if place and word and set(word) <= set(delimiters)]
    return found[:count]


def mean_score(received: Tensor, positions: Sequence[int], length: int, window: int | None = None) -> Tensor:
    """received [head, key], attention summed over the queries of one text → [head].

    A key's score is what it receives over the number of queries that see it, which a sliding `window` limits; the mean
    is over `positions`. NaN where there are none.

    >>> import torch
    >>> mean_score(torch.tensor([[2.0, 0.8, 0.2]]), [1], 3)
    tensor([0.4000])
    """
    import torch

    if not positions:
        return torch.full(received.shape[:1], math.nan, dtype=received.dtype, device=received.device)
    at = torch.tensor(list(positions), device=received.device)
    seeing = (length - at).clamp(max=length if window is None else window)
    return (received[:, at] / seeing).mean(-1)


def uniform_score(positions: Sequence[int], length: int, window: int | None = None) -> float:
    """The same if every query spread its attention evenly over the keys that it sees.

    >>> round(uniform_score([1], 3), 4)  # 1/2 from query 1, 1/3 from query 2
    0.4167
    """
    if not positions:
        return math.nan
    scores = []
    for key in positions:
        last = length if window is None else min(length, key + window)
        received = sum(
            1 / (query + 1 if window is None else min(query + 1, window)) for query in range(key, last)
        )
        scores.append(received / (last - key))
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class DelimiterParams(Params):
    """What the metric can be asked for."""

    delimiters: str = param(".,;:!?\n", help="signs of which a delimiter token consists")
    count: int = param(
        1, help="how many delimiters of a text count, from its beginning", unit="tokens", minimum=1
    )


class DelimiterSinks(Metric[DelimiterParams]):
    """Attention received by a text's first delimiters, by layer."""

    name = "delimiter-sinks"
    version = "1"
    title = "sinks on delimiters"
    description = "share of attention that the first delimiters after position 0 draw"
    citation = "Sun et al. 2024, arXiv:2402.17762"
    Params = DelimiterParams
    tables = (
        TableSpec(
            "texts",
            (
                Column("text", str, None, "the text's id"),
                Column("layer", int, "index", "0-based"),
                Column("head", int, "index", "0-based"),
                Column(
                    "score", float, SHARE, "over the queries that see the delimiter; mean over delimiters"
                ),
                Column("null", float, SHARE, "the same if attention were uniform"),
                Column("n_delimiters", int, "tokens", "delimiters that counted"),
            ),
            "a row per text, layer and head",
        ),
        TableSpec(
            "layers",
            (
                Column("layer", int, "index", "0-based"),
                Column("score", float, SHARE, "mean over texts and heads"),
                Column("ci_low", float, SHARE, interval_help()),
                Column("ci_high", float, SHARE, interval_help()),
                Column("null", float, SHARE, "the same if attention were uniform"),
                Column("strongest", float, SHARE, "the head with the highest mean over texts"),
            ),
            "a row per layer",
        ),
        TableSpec(
            "summary",
            (
                Column("score", float, SHARE, "mean over texts, layers and heads"),
                Column("n_texts", int, "texts", "texts with a delimiter"),
            ),
            "a row per model",
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
        """What each key receives, which costs no attention matrix."""
        return ["blocks.{layer}.attn.hook_received"]

    def update(self, layer: LayerView) -> None:
        """Scores of this layer for the texts of the batch."""
        import torch

        received, batch = layer.float64("attn.hook_received"), layer.batch
        window = self.model.windows[layer.index or 0]
        scores, nulls, counts = [], [], []
        for row, (tokens, length) in enumerate(zip(batch.tokens, batch.lengths, strict=True)):
            words = [batch.spell(token) for token in tokens[:length].tolist()]
            found = delimiter_positions(words, self.params.delimiters, self.params.count)
            scores.append(mean_score(received[row], found, length, window))
            nulls.append(uniform_score(found, length, window))
            counts.append(len(found))
        self.per_text.add(
            layer,
            score=torch.stack(scores),
            null=torch.tensor(nulls, dtype=torch.float64),
            count=torch.tensor(counts, dtype=torch.float64),
        )

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        import numpy as np

        score, null = self.per_text.stack("score"), self.per_text.stack("null")
        count, texts = self.per_text.stack("count"), self.per_text.texts
        present = ~np.isnan(score).any((1, 2))
        for text, is_present in zip(texts, present, strict=True):
            if not is_present:
                self.warn(
                    f"score is null: text {text!r} has no delimiter after position 0, or attention is not finite"
                )
        rows = [
            (texts[at[0]], at[1], at[2], _cell(score[at]), _cell(null[at[:2]]), count[at[:2]])
            for at in np.ndindex(score.shape)
        ]
        mean = float(score[present].mean()) if present.any() else None
        return {
            "texts": self.table("texts", rows),
            "layers": self.table("layers", self._layers(score, null, present)),
            "summary": self.table("summary", [(mean, present.sum())]),
        }

    def _layers(self, score: np.ndarray, null: np.ndarray, present: np.ndarray) -> list[tuple[Any, ...]]:
        """score [text, layer, head], null [text, layer], present [text]."""
        from phaselens.uncertainty import mean_interval

        if not present.any():
            return [(layer, None, None, None, None, None) for layer in range(score.shape[1])]
        order = [place for place in self.per_text.by_content if present[place]]
        columns = [each.tolist() for each in mean_interval(score[order].mean(-1), seed=self.seed)]
        columns.append(null[present].mean(0).tolist())
        columns.append(score[present].mean(0).max(-1).tolist())
        if present.sum() < 2:
            self.warn("fewer than 2 texts with a delimiter: intervals are null")
        return [(layer, *row) for layer, row in enumerate(zip(*columns, strict=True))]


def _cell(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics of this package."""
    return [DelimiterSinks]
