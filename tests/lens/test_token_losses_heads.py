"""Heads of several modules, and those whose logits are a factor of lm_head's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from phaselens.errors import RefusedModel
from phaselens.lens import token_losses
from phaselens.lens.token_losses import ModuleHead, ReferencePredictions
from tests.lens.conftest import lens_of, text


def head_of_three() -> ModuleHead:
    """Return two linear layers with a nonlinearity between, and a factor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModuleHead((nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 33)), 0.5)


@pytest.mark.parametrize("n_pieces", [1, 5])
def test_losses_and_divergence_are_those_of_dense_float64_logits(
    n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_losses, "_MAX_LOGITS", 4 * 33 * 10 // n_pieces)
    head, generator = head_of_three(), torch.Generator().manual_seed(1)
    final, other = torch.randn(2, 10, 8, generator=generator)
    targets = torch.arange(10)
    reference = object.__new__(ReferencePredictions)
    reference.final = other
    with torch.no_grad():
        losses = head.losses(final, targets, reference)
        double = [module.double() for module in head_of_three().modules]

        def log_p(x: torch.Tensor) -> torch.Tensor:
            for module in double:
                x = module(x)
            return (0.5 * x).log_softmax(-1)

        edited, unedited = log_p(final.double()), log_p(other.double())
    expected = functional.nll_loss(edited, targets, reduction="none")
    torch.testing.assert_close(losses.loss.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(losses.top, edited.argmax(-1))
    assert losses.divergence is not None
    divergence = (unedited.exp() * (unedited - edited)).sum(-1)
    torch.testing.assert_close(losses.divergence, divergence, atol=1e-5, rtol=0)


def test_no_token_has_no_loss() -> None:
    with torch.no_grad():
        losses = head_of_three().losses(torch.zeros(1, 8)[:0], torch.zeros(0, dtype=torch.long))
    assert losses.loss.shape == losses.top.shape == (0,)


@pytest.mark.parametrize(("family", "factor"), [("llama", 1.0), ("granite", None), ("cohere2", None)])
def test_the_factor_is_the_one_that_gives_the_models_own_logits(
    family: str, factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = lens_of(family)
    monkeypatch.setattr(lens, "head_paths", ("lm_head",))
    head = ModuleHead.from_model(lens)
    assert head.factor == factor or factor is None
    with torch.no_grad():
        expected = lens.stream(text(), unembed=True)[0]
        computed = head.logits(lens.stream(text())[0])
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-5)


def test_logits_that_no_factor_gives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = lens_of("gemma2")  # its logits are capped
    monkeypatch.setattr(lens, "head_paths", ("lm_head",))
    with pytest.raises(RefusedModel, match="not the output of lm_head, times a factor"):
        ModuleHead.from_model(lens)
