"""The attention that each token receives and the norm that it carries, for the first few texts of a run.

It supplies the text view of a report; a printed run leaves it out. Averages over texts are those of `sink-tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    Batch,
    Column,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._common import LAYER, TEXT, TableRow, none_if_nan
from phaselens_plugins._strongest import uniform_scores

if TYPE_CHECKING:
    import numpy as np

_RECEIVED, _RESIDUAL = "attn.hook_received", "hook_resid_post"
_SHARE = "share of attention"


@dataclass(frozen=True)
class TokenParams(Params):
    """Parameters of the metric: how many texts, and how much of each."""

    n_texts: int = param(6, help="keep the tokens of the first texts of the run", unit="texts", minimum=1)
    n_positions: int = param(256, help="keep the first tokens of each of them", unit="positions", minimum=1)


class Tokens(Metric[TokenParams]):
    """Metric of the attention received and the residual norm, by text, layer and position."""

    name = "tokens"
    version = "1"
    title = "values by token"
    description = "attention that each token of the first texts receives, and its residual norm"
    citation = "PhaseLens"
    Params = TokenParams
    partial_layers = True
    prints = False
    tables = (
        TableSpec(
            "words",
            (
                TEXT,
                Column("position", int, "index", "0-based"),
                Column("token", str, None, "the tokenizer's name for the token"),
            ),
            "the tokens of the first texts",
        ),
        TableSpec(
            "tokens",
            (
                TEXT,
                LAYER,
                Column("position", int, "index", "0-based"),
                Column(
                    "received",
                    float,
                    _SHARE,
                    "attention that the token receives: mean over heads and over the queries that see it, with itself",
                ),
                Column("null", float, _SHARE, "received under uniform attention"),
                Column("norm", float, "norm", "norm of the residual stream after the layer"),
            ),
            "one row per text, layer and position",
        ),
    )

    def setup(self) -> None:
        """Start without texts."""
        #: Spellings of the tokens, by the text's index and id.
        self.words: dict[tuple[int, str], list[str]] = {}
        self.lengths: dict[tuple[int, str], int] = {}
        #: Values [position] of a layer, by the text's index and id.
        self.received: dict[tuple[int, str], dict[int, np.ndarray]] = {}
        self.norms: dict[tuple[int, str], dict[int, np.ndarray]] = {}

    @classmethod
    def define(cls, params: TokenParams) -> str:
        """State which tokens are kept."""
        return f"the first {params.n_positions} tokens of the first {params.n_texts} texts"

    def hooks(self) -> Sequence[str]:
        """Return the points of the attention that keys receive, and of the residual stream."""
        return [in_layer("{layer}", point) for point in (_RECEIVED, _RESIDUAL)]

    def reads(self, batch: Batch) -> bool:
        """Return whether the batch has one of the first texts."""
        return any(index < self.params.n_texts for index in batch.indices)

    def update(self, layer: LayerView) -> None:
        """Keep the values of the first texts."""
        from phaselens.attention import n_seeing
        from phaselens.spectrum import row_norms

        batch, index = layer.batch, layer.index or 0
        for row, text_index in enumerate(batch.indices):
            if text_index >= self.params.n_texts:
                continue
            text, length = (text_index, batch.texts[row]), batch.lengths[row]
            n_positions = min(length, self.params.n_positions)
            if text not in self.words:
                self.words[text] = [batch.token_name(int(token)) for token in batch.tokens[row, :n_positions]]
                self.lengths[text] = length
            if _RECEIVED in layer:
                mass = layer.float64(_RECEIVED)[row, :, :length].mean(0).cpu()
                shares = mass / n_seeing(length, self.model.windows[index])
                self.received.setdefault(text, {})[index] = shares[:n_positions].numpy()
            if _RESIDUAL in layer:
                norms = row_norms(layer[_RESIDUAL][row, :n_positions])
                self.norms.setdefault(text, {})[index] = norms.double().cpu().numpy()

    def merge(self, other: Metric[TokenParams]) -> None:
        """Add the texts of another instance."""
        super().merge(other)
        if isinstance(other, Tokens):
            self.words |= other.words
            self.lengths |= other.lengths
            self.received |= other.received
            self.norms |= other.norms

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of this model."""
        words = [
            (text[1], position, word)
            for text in sorted(self.words)
            for position, word in enumerate(self.words[text])
        ]
        return {"words": self.table("words", words), "tokens": self.table("tokens", self._values())}

    def _values(self) -> Iterator[TableRow]:
        """Yield a row for each kept token in each layer."""
        for text in sorted(self.words):
            received, norms = self.received.get(text, {}), self.norms.get(text, {})
            for layer in sorted({*received, *norms}):
                null = uniform_scores(self.lengths[text], self.model.windows[layer])
                for position in range(len(self.words[text])):
                    yield (
                        text[1],
                        layer,
                        position,
                        none_if_nan(received[layer][position]) if layer in received else None,
                        none_if_nan(null[position]) if layer in received else None,
                        none_if_nan(norms[layer][position]) if layer in norms else None,
                    )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Tokens]
