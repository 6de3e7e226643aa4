"""The mean output of heads over the tokens of other texts, as the value that replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phaselens_plugins._causal import content_keys
from phaselens_plugins._cells import CellMoments, LayerPoint

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import Site


@dataclass(frozen=True, eq=False)
class MeanOfOthers:
    """Edit function that writes the mean [head, d_head] over all tokens of the other texts, at every position.

    `by_text` has the mean for each text that the metric has seen; a text that it has not seen (a prompt) gets the mean
    over all of them, `overall`.
    """

    by_text: Mapping[str, np.ndarray]
    overall: np.ndarray

    @classmethod
    def of_layer(cls, moments: CellMoments, layer_point: LayerPoint) -> MeanOfOthers:
        """Return the means of one layer; texts whose activations are not finite count for no other text."""
        usable = moments.usable_texts
        return cls(
            {
                text: moments.mean([other for other in usable if other != text], layer_point)
                for text in moments.sums
            },
            moments.mean(usable, layer_point),
        )

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Return the means in the shape of tensor [batch, pos, head, d_head]."""
        import numpy as np
        import torch

        if site.batch is None:
            means = self.overall[None]
        else:
            means = np.stack([self.by_text.get(text, self.overall) for text in content_keys(site.batch)])
        rows = torch.from_numpy(means).to(tensor.dtype).to(tensor.device)
        return rows[:, None].expand_as(tensor).clone()
