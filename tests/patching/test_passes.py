"""A pass of one layer at a time: the same for models that cannot resume; points without rows are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phaselens.errors import InputError
from phaselens.patching.passes import LayerwiseRun, capture_activations, require_rows
from tests.patching.conftest import lens_of

TOKENS = torch.tensor([[0, 5, 7, 9, 11]])


def results_by_layer(lens: Any) -> list[torch.Tensor]:
    """Return logits and residual of a pass with an edit in layer 0, resumed from each layer with a change there."""
    edits = [("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)]
    layerwise = LayerwiseRun(lens, TOKENS, edits)
    results: list[torch.Tensor] = []
    for layer in range(lens.info.n_layers):
        change = (f"blocks.{layer}.hook_mlp_out", lambda value, hook: value + 0.25)
        results.append(layerwise.resume([change], 2))
        listener = (f"blocks.{layer}.hook_resid_post", lambda value, hook: results.append(value[0].clone()))
        layerwise.advance([listener])
    return results


def test_a_model_that_cannot_resume_runs_its_layers_again_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lens = lens_of("llama")
    resumed = results_by_layer(lens)
    monkeypatch.setattr(lens, "resume_problem", "its layers read the token embeddings")
    repeated = results_by_layer(lens)
    assert len(resumed) == len(repeated) == 2 * lens.info.n_layers
    for first, second in zip(resumed, repeated, strict=True):
        torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


@pytest.mark.parametrize("check", [require_rows, capture_activations])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0.attn.hook_result", "does not fire in a run of"),
        ("embed.hook_in", "no row for each of the 5 positions"),
    ],
)
def test_points_that_cannot_be_patched_are_refused_by_name(check: Any, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"{name} .*{reason}"):
        check(lens_of("llama"), TOKENS, [name])
