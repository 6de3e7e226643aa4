"""A model whose weights are not finite numbers is refused by the name of the first tensor."""

from __future__ import annotations

import math

import pytest
import torch

import phaselens
from phaselens.errors import RefusedModel
from phaselens.testing import tiny_model


@pytest.mark.parametrize(
    ("tensor", "value", "kind"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan, "NaN"),
        ("model.norm.weight", math.nan, "NaN"),
        ("model.embed_tokens.weight", -math.inf, "infinite values"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(tensor: str, value: float, kind: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[:3] = value
    with pytest.raises(RefusedModel, match=rf"weights hold {kind} \(first: {tensor}, 3 of [\d,]+ numbers"):
        phaselens.load(model)


def test_finite_weights_with_a_sum_beyond_the_dtype_are_served() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[:, :2] = torch.finfo(torch.float32).max
        model.get_parameter("lm_head.weight")[:, 2:] = 0
        model.get_parameter("model.norm.weight")[:2] = 1e-38
    assert phaselens.load(model).info.n_layers == 2


def test_weights_beyond_half_precision_are_refused_with_advice() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] = 1e6
    with pytest.raises(
        RefusedModel, match=r"infinite values \(first: lm_head.weight.*as float16\).*--dtype float32"
    ):
        phaselens.load(model, dtype="float16")
