"""The base of metrics that measure the residual stream after each layer, one text at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from phaselens.plugin import Column, LayerView, Metric, Params, Table, in_layer, param
from phaselens_plugins._common import LayerText, Numbers, TableRow, layer_texts, store_by_text
from phaselens_plugins._layer_metric import LayerMetric, P

if TYPE_CHECKING:
    from torch import Tensor

RESIDUAL = "hook_resid_post"
TOKEN = Column("token", str, None, "the token at this position")
TOKEN_ID = Column("token_id", int, "index", "the token's id")


@dataclass(frozen=True)
class RowParams(Params):
    """Parameters of metrics that treat massive rows separately."""

    massive_factor: float = param(
        10.0, help="a row is massive if its norm is this many times the median row's", minimum=1
    )


class ResidualMetric(LayerMetric[P]):
    """Base of metrics of the residual stream's rows: `measure` for each text and layer, `summary` for each model.

    `points` are the hook points that `measure` reads. `explained` is the quantity whose missing values are explained
    by warnings.
    """

    points: ClassVar[tuple[str, ...]] = (RESIDUAL,)
    explained: ClassVar[str]

    @abstractmethod
    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Return the numbers of one text in one layer by the name under which they are stored, and its `problem`."""

    @abstractmethod
    def summary(self) -> TableRow:
        """Return the row of the table `summary`."""

    def hooks(self) -> Sequence[str]:
        """Return the metric's points in each layer."""
        return [in_layer("{layer}", point) for point in self.points]

    def update(self, layer: LayerView) -> None:
        """Measure this layer for the texts of the batch."""
        store_by_text(self, layer, [self.measure(text) for text in layer_texts(layer)])

    def compute(self) -> Mapping[str, Table]:
        """Return the tables `texts`, `layers` and `summary` of this model."""
        self.explain(self.explained)
        return {
            "texts": self.texts_table(),
            "layers": self.layers_table(),
            "summary": self.table("summary", [self.summary()]),
        }


class TokenListingMetric(ResidualMetric[P]):
    """Base of residual metrics with a table that lists tokens; `spellings` has each token's text by id."""

    def setup(self) -> None:
        """Start with no spellings."""
        super().setup()
        self.spellings: dict[int, str] = {}

    def merge(self, other: Metric[P]) -> None:
        """Merge another instance, with its spellings."""
        super().merge(other)
        if isinstance(other, TokenListingMetric):
            self.spellings |= other.spellings

    def listed_ids(self, text: LayerText, positions: Tensor | Sequence[int]) -> list[int]:
        """Record the spelling of the text's tokens at `positions`, and return their ids."""
        token_ids = text.token_ids(positions)
        for token_id in token_ids:
            if token_id not in self.spellings:
                self.spellings[token_id] = text.layer.batch.token_name(token_id)
        return token_ids
