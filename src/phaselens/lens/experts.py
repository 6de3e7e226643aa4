"""The implementation of a mixture's experts, chosen so that it runs in the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' names: one product per expert, which runs anywhere, and one for all experts (torch's grouped product),
# which is the default.
_BY_EXPERT, _GROUPED = "eager", "grouped_mm"


def use_runnable_experts(model: PreTrainedModel) -> None:
    """Let the experts of a mixture be computed one by one where torch's grouped product cannot compute them.

    That is so in float64, for widths that are not a multiple of 16 bytes, and before torch 2.10, which has no such
    product.
    """
    if _GROUPED in model.get_experts_implementation().values() and not all(
        map(_is_runnable, _experts_of(model))
    ):
        model.set_experts_implementation(_BY_EXPERT)


def _experts_of(model: PreTrainedModel) -> list[tuple[Tensor, bool]]:
    """Return the stacked weights [expert, …, …] of all mixtures, and whether they are stored as [expert, in, out]."""
    return [
        (parameter, module.is_transposed)
        for module in model.modules()
        if hasattr(module, "is_transposed")
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    ]


def _is_runnable(experts: tuple[Tensor, bool]) -> bool:
    """Return whether torch's grouped product runs with these weights, by computing it for one row."""
    grouped_mm = getattr(functional, "grouped_mm", None)
    if grouped_mm is None:
        return False
    weight, is_transposed = experts
    matrices = weight.detach() if is_transposed else weight.detach().mT
    row = matrices.new_zeros(1, matrices.shape[1])
    ends = torch.ones(len(matrices), dtype=torch.int32, device=weight.device)
    try:
        grouped_mm(row, matrices, offs=ends)
    except RuntimeError:
        return False
    return True
