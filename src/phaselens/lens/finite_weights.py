"""The check that the weights of a model are finite numbers, before anything is measured with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phaselens.errors import RefusedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose weights hold NaN or infinite values; every statistic would be NaN, or wrong without it.

    A sum shows in one pass over the memory whether a tensor can hold any; only such a tensor is looked at in detail.

    Raises:
        RefusedModel: naming the first tensor and the number of such values.
    """
    for tensor_name, tensor in model.named_parameters():
        values = tensor.detach()
        if values.dtype not in _DTYPES or values.is_meta or type(values) is not torch.Tensor:
            continue  # without numbers of its own here, or quantised
        if not values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else values.dtype).isfinite():
            _require_finite_values(values, tensor_name, name)


def _require_finite_values(values: Tensor, tensor_name: str, name: str) -> None:
    n_nan, n_infinite = int(values.isnan().sum()), int(values.isinf().sum())
    if not n_nan and not n_infinite:
        return  # finite values with a sum beyond the dtype
    kind, count = ("NaN", n_nan) if n_nan else ("infinite values", n_infinite)
    dtype = str(values.dtype).removeprefix("torch.")
    advice = "" if n_nan or values.dtype.itemsize > 2 else ", or try --dtype float32"
    raise RefusedModel(
        f"model {name!r}: its weights hold {kind} (first: {tensor_name}, {count:,} of {values.numel():,} numbers as "
        f"{dtype}); fetch or copy the checkpoint again{advice}"
    )
