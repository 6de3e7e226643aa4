"""Copies of a model's weights for metrics and edits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phaselens.plugin.views import lazy_copy

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.projection import Projection


def copied_weight(lens: HookedTransformer, layer: int | None, name: str) -> Tensor:
    """Return a copy of `lens.weight_of(layer, name)`; writing into it does not change the model."""
    return lazy_copy(lens.weight_of(layer, name))


def copied_projection(lens: HookedTransformer, layer: int | None, name: str) -> Projection:
    """Return a copy of `lens.projection_of(layer, name)`; writing into its tensors does not change the model."""
    projection = lens.projection_of(layer, name)
    return replace(projection, weight=lazy_copy(projection.weight), bias=lazy_copy(projection.bias))
