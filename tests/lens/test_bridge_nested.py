"""A hook may run another forward: neither of the two changes what the other computes or shows to hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import phaselens
from phaselens.testing import tiny_model
from tests.lens.test_bridge_cached import POINTS, lens_of, pass_through, tokens_of

OUTER_POINTS = (*POINTS["streamed"], "attn.hook_rot_k", "hook_resid_mid", "hook_resid_post")


def other_tokens() -> Tensor:
    return tokens_of(3, 9)


class Nested:
    """A hook that runs `forward`, but not inside itself; `busy` while that runs."""

    def __init__(self, forward: Callable[[], object]) -> None:
        self.forward = forward
        self.busy = False

    def __call__(self, value: Tensor, hook: object) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            self.forward()
        finally:
            self.busy = False


def run_outer(
    lens: phaselens.HookedTransformer, nested: Nested, point: str, chunks: list[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Return logits, and the activations that fire outside of the nested forward."""
    cache = DynamicCache(config=lens.original_model.config) if len(chunks) > 1 else None
    return pass_through(
        lens, tokens_of(), chunks, OUTER_POINTS, cache, sink_position=3,
        hooks=[(f"blocks.1.{point}", nested)], is_own=lambda: not nested.busy,
    )  # fmt: skip


FORWARDS: dict[str, Any] = {
    "whole": lambda lens: lens.stream(other_tokens()),
    "stopped": lambda lens: lens.stream(other_tokens(), stop_at_layer=1),
    "called": lambda lens: lens(other_tokens()),
}


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [[20], [9, 1, 10]])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("point", ["hook_resid_pre", "attn.hook_q", "attn.hook_rot_k", "attn.hook_pattern"])
def test_the_outer_forward_is_unchanged_by_the_inner_one(point: str, forward: str, chunks: list[int]) -> None:
    lens = lens_of("mistral")
    # A hook on the pattern changes how it is computed.
    silent = Nested(lambda: None)
    expected, expected_activations = run_outer(lens, silent, point, chunks)
    logits, activations = run_outer(lens, Nested(lambda: FORWARDS[forward](lens)), point, chunks)
    assert torch.equal(logits, expected)
    assert activations.keys() == expected_activations.keys()
    for name, values in expected_activations.items():
        assert len(activations[name]) == len(values), name
        assert all(map(torch.equal, activations[name], values)), name


def test_a_forward_of_some_layers_is_unchanged_by_an_inner_one() -> None:
    lens = lens_of("llama")
    nested = Nested(lambda: lens.stream(other_tokens()))
    residual = lens.stream(tokens_of(), stop_at_layer=1)
    hooks = [("blocks.0.hook_resid_pre", nested)]
    assert torch.equal(lens.stream(tokens_of(), hooks, stop_at_layer=1), residual)
    hooks = [("blocks.1.hook_resid_pre", nested)]
    resumed = lens.stream(hooks=hooks, residual=residual, start_at_layer=1)
    assert torch.equal(resumed, lens.stream(residual=residual, start_at_layer=1))
    expected = lens.stream(other_tokens(), unembed=True)
    inner: list[Tensor] = []
    hooks = [("blocks.0.hook_resid_pre", Nested(lambda: inner.append(lens(other_tokens()))))]
    lens.stream(tokens_of(), hooks, stop_at_layer=1, lengths=torch.tensor([20, 4]))
    assert torch.equal(inner[0], expected)


def test_the_inner_forward_is_unchanged_by_the_outer_one() -> None:
    lens = lens_of("llama")
    inner: list[Tensor] = []
    hook = ("blocks.1.attn.hook_sink", lambda sink, hook: inner.append(sink))
    lens.stream(other_tokens(), [hook])
    lens.stream(tokens_of(), [("blocks.1.hook_in", Nested(lambda: lens.stream(other_tokens(), [hook])))])
    assert len(inner) == 2
    assert torch.equal(*inner)


def test_an_edit_of_the_mid_residual_stays_in_the_outer_forward() -> None:
    lens = lens_of("llama")
    nested = Nested(lambda: lens.stream(other_tokens()))
    double = ("blocks.1.hook_resid_mid", lambda value, hook: None if nested.busy else 2 * value)
    expected = lens.stream(tokens_of(), [double])
    assert torch.equal(lens.stream(tokens_of(), [double, ("blocks.1.hook_mlp_out", nested)]), expected)


def test_each_forward_rotates_by_the_lengths_of_its_own_texts() -> None:
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    lens = phaselens.load(
        tiny_model("llama", max_position_embeddings=12, rope_parameters=parameters), check=False
    )
    nested = Nested(lambda: lens.stream(other_tokens()))
    lengths = torch.tensor([5, 20])
    expected = lens.stream(tokens_of(), lengths=lengths)
    # The embedding's hook runs before the rotation is computed.
    assert torch.equal(lens.stream(tokens_of(), [("hook_embed", nested)], lengths=lengths), expected)
