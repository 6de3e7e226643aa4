"""Experts are computed in every dtype and width; where the grouped product can compute them, it does."""

from __future__ import annotations

import pytest
import torch

import phaselens
from tests.lens.conftest import text
from tests.lens.mixtures import tiny_mixture


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("dtype", "width", "implementation"),
    [
        (torch.float32, 16, "grouped_mm"),
        (torch.bfloat16, 16, "grouped_mm"),
        (torch.bfloat16, 12, "eager"),
        (torch.float64, 16, "eager"),
    ],
)
def test_experts_are_computed_one_by_one_only_where_the_grouped_product_fails(
    model_type: str, dtype: torch.dtype, width: int, implementation: str
) -> None:
    lens = phaselens.load(tiny_mixture(model_type, dtype, intermediate_size=width))
    assert lens.original_model.config._experts_implementation == implementation
    assert lens.stream(text()).isfinite().all()


@pytest.mark.slow
def test_the_users_own_implementation_stays() -> None:
    model = tiny_mixture("mixtral")
    model.set_experts_implementation("batched_mm")
    assert phaselens.load(model).original_model.config._experts_implementation == "batched_mm"
