"""The final norm with its divisor fixed: a linear map that reproduces the norm, and is refused where there is none."""

from __future__ import annotations

import pytest
import torch

from phaselens.errors import RefusedModel
from phaselens.lens.final_norm import frozen_final_norm
from phaselens.testing import tiny_lens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_map_is_the_norms_formula_with_its_divisor_fixed(family):
    lens = tiny_lens(family, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    residual, output, part = torch.randn(3, lens.info.d_model, generator=generator, dtype=torch.float64)
    direction, constant = frozen_final_norm(lens, residual, output)
    norm = lens.original_model.model.norm if family == "llama" else lens.original_model.transformer.ln_f
    with torch.no_grad():
        assert float(direction @ residual) + constant == pytest.approx(
            float(output @ norm(residual)), abs=1e-6
        )
        centred = part - part.mean() if family == "gpt2" else part
        spread = residual - residual.mean() if family == "gpt2" else residual
        divisor = (spread.square().mean() + (norm.eps if family == "gpt2" else norm.variance_epsilon)).sqrt()
        assert float(direction @ part) == pytest.approx(
            float((output * norm.weight * centred).sum() / divisor), abs=1e-5
        )


def test_a_norm_that_is_not_one_division_is_refused() -> None:
    class BoundedNorm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x)

    lens = tiny_lens("llama")
    lens._modules["ln_final"] = BoundedNorm()
    generator = torch.Generator().manual_seed(0)
    residual, output = torch.randn(2, lens.info.d_model, generator=generator)
    with pytest.raises(RefusedModel, match="its final norm does not divide by one number"):
        frozen_final_norm(lens, residual, output)


def test_a_model_without_a_final_norm_has_the_direction_itself() -> None:
    lens = tiny_lens("llama")
    del lens._modules["ln_final"]
    output = torch.randn(lens.info.d_model)
    direction, constant = frozen_final_norm(lens, torch.ones(lens.info.d_model), output)
    assert torch.equal(direction, output.double())
    assert constant == 0.0
