"""A forward from the residual above the last layer gives the body's output, with a final norm and without."""

from __future__ import annotations

import pytest
import torch
from tools.families.models import tiny_model

import phaselens
from phaselens.lens import run_checks

MODEL_TYPES = [
    "bert",
    "openai-gpt",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("electra", "bart")),
]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_body_returns_the_residual_above_the_last_layer_where_it_has_no_final_norm(
    model_type: str,
) -> None:
    lens = phaselens.load(tiny_model(model_type))
    tokens = torch.randint(4, 58, (2, 9), generator=torch.Generator().manual_seed(0))
    residual = lens.stream(tokens, stop_at_layer=lens.info.n_layers)
    assert torch.equal(lens.stream(residual=residual, start_at_layer=lens.info.n_layers), lens.stream(tokens))
    assert "ln_final" not in lens._modules


def test_a_final_norm_that_is_not_the_bodys_fails_the_check_of_resuming() -> None:
    lens = phaselens.load(tiny_model("llama"), check="report")
    lens._modules["ln_final"] = torch.nn.Identity()
    failed = [result for result in run_checks(lens) if not result.ok]
    assert "start_at_layer gives the same output and skips the layers below" in [
        result.name for result in failed
    ]
