"""Sink tokens: every token whose residual row is far larger than the others, or that receives too much attention.

A sink is usually position 0, but not only: the first delimiter of a text often becomes massive in the same layers, and
points in the same direction as position 0 (a secondary sink). The table `tokens` lists each such token with the layers
in which it is one; the table `mask` has its text and position only, for those who must leave such tokens out, as when a
sparse autoencoder is trained on the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from phaselens.plugin import Column, Display, Metric, Table, TableSpec, hookimpl, param
from phaselens_plugins._common import N_TEXTS, TEXT, LayerText, Numbers, TableRow, mean_or_none
from phaselens_plugins._layer_metric import (
    NO_PROBLEM,
    NOT_FINITE,
    SHORT,
    Quantity,
    layer_tables,
    missing_record,
)
from phaselens_plugins._residual import RESIDUAL, TOKEN, TOKEN_ID, RowParams, TokenListingMetric
from phaselens_plugins._sink_tokens import SinkToken, TextTokens

if TYPE_CHECKING:
    from torch import Tensor

RECEIVED, ITSELF = "attn.hook_received", "attn.hook_itself"
TOKENS = "tokens per text"
SHARE = "share of attention"
UNIFORM = "uniform attention, and rows of equal norm, at this text's length and window"
QUANTITIES = (
    Quantity("listed", TOKENS, "tokens that carry too large a row or receive too much from the queries after them",
             UNIFORM),
    Quantity("carrying", TOKENS, "tokens whose residual row is massive after the layer"),
    Quantity("receiving", TOKENS, "tokens that receive too much attention from the queries after them", UNIFORM),
    Quantity("secondary", TOKENS, "listed tokens other than 0 whose row points in the direction of position 0's"),
)  # fmt: skip


@dataclass(frozen=True)
class SinkTokenParams(RowParams):
    """Parameters of the metric: when a token is listed."""

    mass: float = param(
        0.1,
        help="a token receives too much if the queries after it that see it give it this much, on average",
        unit=SHARE,
        minimum=0,
        maximum=1,
    )
    over: str = param(
        "mean",
        help="a layer's received attention: the mean over its heads (mean), or that of the head with the most (any)",
        choices=("mean", "any"),
    )
    similarity: float = param(
        0.8,
        help="a listed token is a secondary sink if the cosine of its row with position 0's is greater",
        unit="cosine",
        minimum=-1,
        maximum=1,
    )
    min_queries: int = param(
        8,
        help="tokens that fewer later queries see (or, in short texts and windows, fewer than half of those that see "
        "position 0) are not listed for what they receive",
        unit="queries",
        minimum=1,
    )


class SinkTokens(TokenListingMetric[SinkTokenParams]):
    """Metric that lists the tokens that carry or receive too much, with the layers in which they do."""

    name = "sink-tokens"
    version = "1"
    title = "sink tokens"
    description = (
        "every token that receives or carries too much: position, layers, secondary sinks; a token mask"
    )
    citation = "Sun et al. 2024, arXiv:2402.17762 (massive rows); arXiv:2512.22213 (secondary sinks)"
    Params = SinkTokenParams
    quantities = QUANTITIES
    explained = "listed"
    points: ClassVar[tuple[str, ...]] = (RESIDUAL, RECEIVED, ITSELF)
    tables = (
        *layer_tables(QUANTITIES),
        TableSpec(
            "tokens",
            (
                TEXT,
                Column("position", int, "index", "absolute: 0 is the text's first token"),
                TOKEN,
                TOKEN_ID,
                Column("kind", str, None, "carries, receives, or both"),
                Column("first_layer", int, "index", "first layer in which the token is listed"),
                Column("last_layer", int, "index", "last layer in which it is listed"),
                Column("n_layers", int, "layers", "layers in which it is listed"),
                Column(
                    "ratio",
                    float,
                    "ratio",
                    "norm of its row over that of the median row, largest of all layers",
                ),
                Column("ratio_layer", int, "index", "the layer of that ratio"),
                Column(
                    "mass",
                    float,
                    SHARE,
                    "largest attention received from a query after it that sees it, mean over these queries, of all "
                    "layers; missing where no query follows",
                ),
                Column("mass_layer", int, "index", "the layer of that attention"),
                Column("secondary_first", int, "index", "first layer in which it is a secondary sink"),
                Column("secondary_last", int, "index", "last layer in which it is a secondary sink"),
                Column("n_secondary", int, "layers", "layers in which it is a secondary sink"),
                Column("is_bos", int, "0 or 1", "whether it is the model's BOS token"),
                Column("is_delimiter", int, "0 or 1", "whether it consists of white space and .,;:!? only"),
            ),
            "every listed token",
        ),
        TableSpec(
            "mask",
            (TEXT, Column("position", int, "index", "absolute: 0 is the text's first token")),
            "the listed tokens' texts and positions only, to leave these tokens out",
        ),
        TableSpec(
            "summary",
            (
                Column("listed", float, TOKENS, "tokens listed in any layer, mean over texts"),
                Column("listed_share", float, "share of tokens", "of all texts' tokens"),
                Column("secondary", float, TOKENS, "secondary sinks of any layer, mean over texts"),
                Column("secondary_first", int, "index", "first layer with a secondary sink in any text"),
                Column("secondary_last", int, "index", "last layer with one"),
                Column("tokens", str, None, "the most frequent listed tokens"),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="listed",
        title="sink tokens",
        low="ci_low",
        high="ci_high",
        null="null",
        digits=2,
        also=(("carrying", "carry"), ("receiving", "receive"), ("secondary", "secondary")),
        summary=(
            ("listed", "any layer"),
            ("secondary", "secondary"),
            ("secondary_first", "from"),
            ("secondary_last", "to"),
        ),
    )

    @classmethod
    def define(cls, params: SinkTokenParams) -> str:
        """State when a token is listed, and what a secondary sink is."""
        heads = {"mean": "mean over heads", "any": "in any head"}[params.over]
        return (
            f"tokens whose row's norm is at least {params.massive_factor:g} × the text's median, or that receive at "
            f"least {params.mass:g} of the attention of the queries after them that see them, {heads}, if at least "
            f"{params.min_queries} do; secondary: position > 0 and cosine with row 0 > {params.similarity:g}"
        )

    def setup(self) -> None:
        """Start without tokens."""
        super().setup()
        self.tokens_by_text: dict[int, TextTokens] = {}

    def merge(self, other: Metric[SinkTokenParams]) -> None:
        """Merge another instance, with its tokens."""
        super().merge(other)
        if isinstance(other, SinkTokens):
            self.tokens_by_text |= other.tokens_by_text

    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Count the listed tokens of one text in one layer, and record them."""
        import torch

        from phaselens.spectrum import massive_rows, median, row_cosines, row_norms

        layer, batch = text.layer.index or 0, text.layer.batch
        index, n = batch.indices[text.index], text.n_tokens
        if index not in self.tokens_by_text:
            self.tokens_by_text[index] = TextTokens.empty(batch.tokens[text.index, :n].cpu().numpy())
        if n < 2:
            return missing_record(QUANTITIES, SHORT)
        x = text[RESIDUAL]
        norms = row_norms(x)
        mass, has_enough = self._later_mass(text)
        if not bool(norms.isfinite().all()) or not bool(mass[:-1].isfinite().all()):
            return missing_record(QUANTITIES, NOT_FINITE)
        middle = median(norms)
        ratio = norms / middle if middle > 0 else torch.full_like(norms, torch.nan)
        carrying = massive_rows(norms, self.params.massive_factor).cpu()
        receiving = has_enough & (mass >= self.params.mass)
        listed = carrying | receiving
        secondary = listed & (row_cosines(x, x[0]) > self.params.similarity).cpu()
        secondary[0] = False
        tokens = self.tokens_by_text[index]
        tokens.raise_to("ratio", ratio.cpu().numpy(), layer)
        tokens.raise_to("mass", mass.numpy(), layer)
        for name, flags in (("carrying", carrying), ("receiving", receiving), ("secondary", secondary)):
            if bool(flags.any()):
                getattr(tokens, name)[layer] = flags.nonzero()[:, 0].tolist()
        self.listed_ids(text, listed.nonzero()[:, 0])
        null = self._uniform_count(n, layer)
        return {
            "listed": float(listed.sum()),
            "listed_null": null,
            "carrying": float(carrying.sum()),
            "receiving": float(receiving.sum()),
            "receiving_null": null,
            "secondary": float(secondary.sum()),
            "problem": NO_PROBLEM,
        }

    def _later_mass(self, text: LayerText) -> tuple[Tensor, Tensor]:
        """Return what each token receives from the queries after it that see it, mean over them, [pos]; and whether
        enough of them do."""
        import torch

        n = text.n_tokens
        received, itself = (
            text.layer.float64(point)[text.index, :, :n].cpu() for point in (RECEIVED, ITSELF)
        )
        later = received - itself
        later = later.mean(0) if self.params.over == "mean" else later.amax(0)
        n_later = self._n_later(n, text.layer.index or 0)
        return torch.where(n_later > 0, later / n_later, torch.nan), self._has_enough(n_later)

    def _n_later(self, n_tokens: int, layer: int) -> Tensor:
        """Return the number of queries after each token that see it, [pos]."""
        from phaselens.attention import n_seeing

        return n_seeing(n_tokens, self.model.windows[layer]) - 1

    def _has_enough(self, n_later: Tensor) -> Tensor:
        required = min(float(self.params.min_queries), float((n_later[0] + 1) // 2))
        return (n_later >= required) & (n_later > 0)

    def _uniform_count(self, n_tokens: int, layer: int) -> float:
        """Return the number of tokens that are listed if attention is uniform."""
        import torch

        from phaselens.attention import uniform_received

        window = self.model.windows[layer]
        n_keys = torch.arange(1, n_tokens + 1, dtype=torch.float64)
        itself = 1 / (n_keys if window is None else n_keys.clamp(max=window))
        n_later = self._n_later(n_tokens, layer)
        mass = (uniform_received(n_tokens, window) - itself) / n_later.clamp(min=1)
        return float((self._has_enough(n_later) & (mass >= self.params.mass)).sum())

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        tokens = list(self._tokens())
        mask = [(token.text, token.position) for token in tokens]
        return {
            **super().compute(),
            "tokens": self.table("tokens", tokens),
            "mask": self.table("mask", mask),
        }

    def _tokens(self) -> Iterator[SinkToken]:
        for text_id, index in zip(self.per_text.texts, sorted(self.tokens_by_text), strict=True):
            yield from self.tokens_by_text[index].rows(text_id, self.spellings, self.model.bos_token_id)

    def summary(self) -> TableRow:
        """Return the number of listed tokens, the layers of secondary sinks, and the most frequent tokens."""
        import numpy as np

        tokens = list(self._tokens())
        measured = ~np.isnan(self.values("listed")).all(1)
        counts = {
            kind: np.array(
                [
                    sum(
                        token.text == text_id and (kind == "listed" or token.n_secondary > 0)
                        for token in tokens
                    )
                    for text_id in self.per_text.texts
                ],
                dtype=np.float64,
            )[measured]
            for kind in ("listed", "secondary")
        }
        n_tokens = int(np.array(self.per_text.lengths)[measured].sum())
        layers = [
            layer
            for token in tokens
            for layer in (token.secondary_first, token.secondary_last)
            if layer is not None
        ]
        return (
            mean_or_none(counts["listed"]),
            float(counts["listed"].sum()) / n_tokens if n_tokens else None,
            mean_or_none(counts["secondary"]),
            min(layers) if layers else None,
            max(layers) if layers else None,
            _most_frequent([token.token for token in tokens]),
            int(measured.sum()),
        )


def _most_frequent(spellings: list[str]) -> str | None:
    """Return the most frequent of the spellings, up to six, with the first one first among equals."""
    from collections import Counter

    frequent = Counter(spellings).most_common(6)
    return ", ".join(repr(spelling) for spelling, _ in frequent) if frequent else None


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [SinkTokens]
