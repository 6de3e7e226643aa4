"""Massive coordinates of texts, and sums of the residual stream around them, by text and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phaselens_plugins._causal import content_keys, merge_nested
from phaselens_plugins._common import layer_texts
from phaselens_plugins._residual import RESIDUAL

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import LayerView

BOS, OTHER = CLASSES = ("BOS", "other")
"""Classes of tokens: position 0, and all other positions."""


@dataclass(frozen=True)
class Criterion:
    """Sun et al.'s criterion: |a| > `threshold` and |a| ≥ `ratio` × the median |a| of the layer and text."""

    threshold: float
    ratio: float

    def mask(self, x: Tensor) -> Tensor:
        """Return bool [pos, d_model], True for massive coordinates of x [pos, d_model]."""
        from phaselens.spectrum import massive_coordinates

        return massive_coordinates(x, threshold=self.threshold, ratio=self.ratio)


@dataclass(frozen=True)
class LayerMoments:
    """One text in one layer; everything is [d_model] but the last three.

    `counts` and `sums` are of massive coordinates, by class of tokens: how many tokens, and Σ x. `squares` is Σ x² over
    the tokens of a class that have a massive coordinate (position 0 always), `massive_squares` that of the massive
    coordinates alone, `all_squares` over all tokens. `plain_sums` is Σ x over the `n_plain` tokens without a massive
    coordinate.
    """

    counts: Mapping[str, np.ndarray]
    sums: Mapping[str, np.ndarray]
    squares: Mapping[str, np.ndarray]
    massive_squares: Mapping[str, np.ndarray]
    all_squares: np.ndarray
    plain_sums: np.ndarray
    n_plain: int
    largest: float
    largest_ratio: float

    @property
    def is_finite(self) -> bool:
        """Whether the text's residual is finite in this layer."""
        import numpy as np

        return bool(np.isfinite(self.all_squares).all())

    @classmethod
    def measure(cls, x: Tensor, criterion: Criterion) -> LayerMoments:
        """Measure the residual x [pos, d_model] of one text."""
        import torch

        from phaselens.spectrum import massive_activations

        mask = criterion.mask(x)
        is_plain = ~mask.any(-1)
        is_first = torch.arange(len(x), device=x.device) == 0
        rows = {BOS: is_first, OTHER: ~is_plain & ~is_first}
        counts, sums, squares, massive_squares = {}, {}, {}, {}
        for name, chosen in rows.items():
            chosen_mask = mask[chosen]
            values = x[chosen].double()
            massive_values = values.masked_fill(~chosen_mask, 0.0)
            counts[name] = chosen_mask.sum(0).cpu().numpy()
            sums[name] = massive_values.sum(0).cpu().numpy()
            squares[name] = values.square().sum(0).cpu().numpy()
            massive_squares[name] = massive_values.square().sum(0).cpu().numpy()
        largest = massive_activations(x, n=1)
        return cls(
            counts,
            sums,
            squares,
            massive_squares,
            x.double().square().sum(0).cpu().numpy(),
            x[is_plain].double().sum(0).cpu().numpy(),
            int(is_plain.sum()),
            abs(largest.values[0]) if largest.values else float("nan"),
            largest.ratio,
        )


@dataclass
class MassiveMoments:
    """The moments of texts by content and layer. They can be pickled, and merged in any order."""

    by_text: dict[str, dict[int, LayerMoments]] = field(default_factory=dict)

    def add(self, layer: LayerView, criterion: Criterion) -> None:
        """Add one layer of the texts of a batch; texts of equal content count once."""
        for content, text in zip(content_keys(layer.batch), layer_texts(layer), strict=True):
            moments = LayerMoments.measure(text[RESIDUAL], criterion)
            self.by_text.setdefault(content, {})[layer.index or 0] = moments

    def merge(self, other: MassiveMoments) -> None:
        """Add the moments of `other`."""
        merge_nested(self.by_text, other.by_text)

    @property
    def usable(self) -> list[str]:
        """The texts whose residuals are finite in every layer, ordered by content."""
        return sorted(
            content
            for content, layers in self.by_text.items()
            if all(moments.is_finite for moments in layers.values())
        )
