"""Losses from pieces of the vocabulary equal those of complete logits, and no matrix of all logits is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import phaselens
from phaselens.errors import RefusedModel
from phaselens.lens.token_losses import _MAX_LOGITS, ReferencePredictions, Unembedding, token_losses
from phaselens.testing import FAMILIES, tiny_model
from tests.lens.conftest import lens_of, text


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return output


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("llama", "gemma2", "cohere2") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
@pytest.mark.parametrize("n_pieces", [1, 5])
def test_losses_are_the_models_own_cross_entropy(
    family: str, n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens, tokens = lens_of(family), text()
    targets = tokens[:, 1:].flatten()
    monkeypatch.setattr("phaselens.lens.token_losses._MAX_LOGITS", len(targets) * -(-67 // n_pieces))
    computed = token_losses(lens, lens.stream(tokens)[:, :-1].flatten(0, 1), targets)
    logits = lens.stream(tokens, unembed=True)[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.allclose(computed.loss.double(), expected, atol=5e-6)
    assert torch.equal(computed.top, logits.argmax(-1))


@pytest.mark.parametrize("n_pieces", [1, 67])
def test_infinite_logits_give_the_losses_of_complete_logits(
    n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token with logit −inf adds nothing to other losses, even alone in a piece; its own loss is infinite."""
    unembedding = Unembedding(torch.eye(67), torch.zeros(67).index_fill(0, torch.tensor([3, 4]), -torch.inf))
    targets = torch.arange(67)
    final = torch.randn(67, 67, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("phaselens.lens.token_losses._MAX_LOGITS", 67 * -(-67 // n_pieces))
    computed = unembedding.losses(final, targets)
    expected = functional.cross_entropy(unembedding.logits(final), targets, reduction="none")
    assert torch.allclose(computed.loss, expected, atol=5e-6)
    assert computed.loss.isinf().nonzero().flatten().tolist() == [3, 4]


@pytest.mark.slow
def test_logits_of_a_vocabulary_of_128_k_are_never_in_memory_at_once() -> None:
    lens = phaselens.load(tiny_model("llama", vocab_size=128_000), check=False)
    tokens = torch.randint(0, 128_000, (1, 1024), generator=torch.Generator().manual_seed(0))
    final = lens.stream(tokens)[0, :-1]
    token_losses(lens, final[:1], tokens[0, 1:2])  # checks the unembedding on a few tokens
    with Largest() as largest_tensor:
        computed = token_losses(lens, final, tokens[0, 1:])
    assert largest_tensor.numbers <= _MAX_LOGITS < 1023 * 128_000
    expected = functional.cross_entropy(
        lens.original_model.lm_head(final[::97]), tokens[0, 1::97], reduction="none"
    )
    assert torch.allclose(computed.loss[::97], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_sums_are_float32(dtype: torch.dtype) -> None:
    lens = phaselens.load(tiny_model("llama", dtype=dtype), check=False)
    tokens = text()
    computed = token_losses(lens, lens.stream(tokens)[0, :-1], tokens[0, 1:])
    logits = lens.stream(tokens, unembed=True)[0, :-1]
    assert computed.loss.dtype == torch.float32
    assert torch.allclose(
        computed.loss, functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="none"), atol=1e-4
    )


def test_logits_computed_in_another_way_are_refused() -> None:
    lens = phaselens.load(tiny_model("llama"), label="odd", check=False)
    lens.original_model.lm_head.register_forward_hook(lambda module, args, logits: logits**3)
    with pytest.raises(RefusedModel, match=r"odd: its logits are not final norm × lm_head.*off by"):
        token_losses(lens, lens.stream(text())[0, :-1], text()[0, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("n_pieces", [1, 5])
@pytest.mark.parametrize("size", [1e-6, 1.0, 20.0])
def test_the_divergence_is_that_of_the_dense_distributions(
    monkeypatch: pytest.MonkeyPatch, n_pieces: int, size: float
) -> None:
    """The divergence is exact down to 1e-14, where a difference of log-sum-exps would have no digit."""
    lens = lens_of("gemma2", dtype=torch.float64)
    tokens = text(1, 9)
    final = lens.stream(tokens)[0]
    generator = torch.Generator().manual_seed(0)
    edited = final + size * torch.randn(final.shape, generator=generator, dtype=final.dtype)
    losses = token_losses(lens, edited, tokens[0], ReferencePredictions(lens, final))
    assert torch.equal(losses.loss, token_losses(lens, edited, tokens[0]).loss)
    if n_pieces > 1:
        monkeypatch.setattr(phaselens.lens.token_losses, "_MAX_LOGITS", 4 * 9 * 67 // n_pieces)
        pieces = token_losses(lens, edited, tokens[0], ReferencePredictions(lens, final))
        torch.testing.assert_close(pieces.divergence, losses.divergence, rtol=1e-7, atol=1e-22)
    unembedding = Unembedding.from_model(lens)
    p, q = (unembedding.logits(rows).double().log_softmax(-1) for rows in (final, edited))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(losses.divergence, expected, rtol=1e-6, atol=1e-14)
    same = token_losses(lens, final, tokens[0], ReferencePredictions(lens, final)).divergence
    assert torch.equal(same, torch.zeros_like(same))
