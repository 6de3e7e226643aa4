"""`hook_loss`: the model's own cross-entropy by token, in every kind of forward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import phaselens
from phaselens.lens.checks import capture
from phaselens.plugin import Edit
from phaselens.testing import tiny_model
from tests.lens.conftest import dense, lens_of, text
from tests.marks import mark_later_slow

HOOK = {"loss": "hook_loss"}


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of each token but the first, [batch, pos − 1], in float64."""
    return cross_entropy(logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gemma2", "cohere2", "granite", "gpt2"]))
def test_it_is_the_cross_entropy_of_the_models_own_logits(family: str, tokens: Tensor) -> None:
    loss = capture(lens_of(family), tokens, HOOK)[1]["loss"]
    assert loss.shape == tokens.shape
    assert loss.dtype == torch.float32
    assert bool(loss[:, 0].isnan().all())
    torch.testing.assert_close(
        loss[:, 1:].double(), losses(dense(family).logits, tokens), atol=1e-4, rtol=1e-5
    )


def test_pads_have_no_loss_and_change_none(tokens: Tensor) -> None:
    lens = lens_of("llama-gqa")
    unpadded = capture(lens, tokens[1:, :5], HOOK)[1]["loss"]
    padded = capture(lens, tokens, HOOK, lengths=torch.tensor([24, 5]))[1]["loss"]
    torch.testing.assert_close(padded[1:, :5], unpadded, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert bool(padded[1, 5:].isnan().all())
    mask = torch.arange(24)[None] >= torch.tensor([[0], [19]])
    shifted = torch.cat([tokens[1, :5].new_zeros(19), tokens[1, :5]])
    cached: dict[str, Tensor] = {}
    with torch.no_grad():
        lens.run_with_hooks(
            torch.stack([tokens[0], shifted]),
            attention_mask=mask.long(),
            fwd_hooks=[("hook_loss", lambda loss, hook: cached.update(loss=loss))],
        )
    torch.testing.assert_close(cached["loss"][1:, 19:], unpadded, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert bool(cached["loss"][1, :20].isnan().all())


def test_it_fires_under_transformer_lens_and_in_the_first_forward_of_a_model(tokens: Tensor) -> None:
    lens = phaselens.load(tiny_model("llama"), check=False)
    n_calls: list[int] = []
    with torch.no_grad():
        lens.run_with_hooks(tokens, fwd_hooks=[("hook_loss", lambda loss, hook: n_calls.append(len(loss)))])
        _, cache = lens.run_with_cache(tokens)
    assert n_calls == [len(tokens)]
    torch.testing.assert_close(cache["hook_loss"], capture(lens, tokens, HOOK)[1]["loss"], equal_nan=True)


def test_a_cached_call_lacks_the_loss_that_the_call_before_predicts(tokens: Tensor) -> None:
    lens = lens_of("llama")
    chunks: list[Tensor] = []
    with torch.no_grad(), lens.hooks(fwd_hooks=[("hook_loss", lambda loss, hook: chunks.append(loss))]):
        cache = lens.original_model(tokens[:, :9], use_cache=True).past_key_values
        lens.original_model(tokens[:, 9:], past_key_values=cache)
    complete = capture(lens, tokens, HOOK)[1]["loss"]
    complete[:, 9] = torch.nan
    torch.testing.assert_close(torch.cat(chunks, 1), complete, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_it_needs_tokens_and_cannot_be_edited(tokens: Tensor) -> None:
    lens = lens_of("llama")
    residual = lens.stream(tokens, stop_at_layer=1)
    with pytest.raises(phaselens.InputError, match="hook_loss needs the tokens of the text"):
        lens.stream(residual=residual, start_at_layer=1, hooks=[("hook_loss", lambda loss, hook: None)])
    with pytest.raises(phaselens.InputError, match="hook_loss: a hook returned a new value"):
        lens.stream(tokens, [("hook_loss", lambda loss, hook: loss * 0)])
    with pytest.raises(phaselens.InputError, match="edit an activation that it depends on instead"):
        Edit("hook_loss", 0.0)


@pytest.mark.slow
def test_it_keeps_no_model_alive() -> None:
    lens = phaselens.load(tiny_model("llama"), check=False)
    capture(lens, text(), HOOK)
    reference = weakref.ref(lens)
    del lens
    gc.collect()
    assert reference() is None
