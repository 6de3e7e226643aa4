"""The loss of each token from the final norm's output, with logits in pieces of the vocabulary.

A matrix [tokens, vocabulary] is gigabytes at 128 k entries; the loss needs of it one number a token (the log of the
sum) and the target's own logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from phaselens.errors import RefusedModel

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

#: Logits that stand in memory at one time: 64 MB of float32.
_AT_ONCE = 2**24
#: How far our log-probabilities may be from the model's own on a few tokens, in units of the dtype's rounding.
_ROUNDINGS = 256


@dataclass(frozen=True)
class TokenLosses:
    """`loss` [tokens] in nats, float32 (float64 in a float64 model); `top` [tokens] the likeliest token's id."""

    loss: Tensor
    top: Tensor


@dataclass(frozen=True)
class Unembedding:
    """What turns the final norm's output into logits: a matrix, perhaps a bias, a factor and a soft cap."""

    weight: Tensor
    bias: Tensor | None
    factor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, lens: HookedTransformer) -> Unembedding:
        """That of this model, tried on a few of its tokens.

        Raises:
            RefusedModel: where the model makes its logits in another way.
        """
        model = lens.original_model
        config = model.config
        head = getattr(model, "lm_head", None) or getattr(model, "embed_out", None)
        weight = getattr(head, "weight", None)
        if head is None or not isinstance(weight, Tensor):
            raise RefusedModel(
                f"{lens.info.label}: {type(model).__name__} has no lm_head; its loss cannot be computed"
            )
        factor = float(getattr(model, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        found = cls(
            weight, getattr(head, "bias", None), factor, getattr(config, "final_logit_softcapping", None)
        )
        found._require_like(lens)
        return found

    def logits(self, final: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Logits [..., last − first] of the tokens `first` to `last`, as the model rounds them, then in float32."""
        bias = None if self.bias is None else self.bias[first:last]
        logits = functional.linear(final.to(self.weight.device), self.weight[first:last], bias)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, final: Tensor, targets: Tensor) -> TokenLosses:
        """Cross-entropy of `targets` [tokens] where the final norm gave `final` [tokens, d_model]."""
        n_tokens, n_entries = len(final), len(self.weight)
        targets = targets.to(self.weight.device)
        step = max(1, _AT_ONCE // max(1, n_tokens))
        total, best, top, own = self._start(n_tokens)
        for first in range(0, n_entries, step):
            logits = self.logits(final, first, first + step)
            most, where = logits.max(-1)
            better = most > best
            best, top = torch.where(better, most, best), torch.where(better, where + first, top)
            at = targets - first
            inside = (at >= 0) & (at < logits.shape[-1])
            own = torch.where(inside, logits.gather(-1, torch.where(inside, at, 0)[:, None])[:, 0], own)
            # In place, with the largest that is known already; logsumexp would look for it again.
            shift = most.masked_fill(most.isinf(), 0.0)
            total = torch.logaddexp(total, logits.sub_(shift[:, None]).exp_().sum(-1).log() + shift)
        return TokenLosses(total - own, top)

    def _start(self, n_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        lowest = torch.full((n_tokens,), -torch.inf, dtype=dtype, device=self.weight.device)
        return (
            lowest,
            lowest,
            torch.zeros(n_tokens, dtype=torch.long, device=lowest.device),
            torch.zeros_like(lowest),
        )

    def _require_like(self, lens: HookedTransformer) -> None:
        tokens = torch.arange(min(4, lens.info.d_vocab))[None]
        with torch.no_grad():
            expected = lens.stream(tokens, unembed=True)[0].double().log_softmax(-1)
            found = self.logits(lens.stream(tokens)[0]).double().log_softmax(-1).to(expected.device)
        # Weights that are NaN give NaN both ways: no question of how logits are made. Losses are then missing.
        known = ~(expected.isnan() & found.isnan())
        expected, found = torch.where(known, expected, 0.0), torch.where(known, found, 0.0)
        limit = _ROUNDINGS * torch.finfo(self.weight.dtype).eps * max(1.0, float(expected.abs().max()))
        worst = float((expected - found).abs().max())
        if not worst <= limit:
            raise RefusedModel(
                f"{lens.info.label}: its logits are not final norm × lm_head, scaled and capped as configured "
                f"(off by {worst:.3g}, at most {limit:.3g} is allowed); its loss cannot be computed in pieces"
            )


def token_losses(lens: HookedTransformer, final: Tensor, targets: Tensor) -> TokenLosses:
    """Cross-entropy of each target, without a matrix [tokens, vocabulary].

    Args:
        lens: the model.
        final: [tokens, d_model], the final norm's output where the target is predicted.
        targets: [tokens], ids.

    Returns:
        Nats per token, and the token the model would have said.

    >>> import phaselens
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tokens = torch.tensor([[0, 5, 7, 9]])
    >>> found = token_losses(lens, lens.stream(tokens)[0, :-1], tokens[0, 1:])
    >>> logits = lens.stream(tokens, unembed=True)[0, :-1]
    >>> bool(torch.allclose(found.loss, functional.cross_entropy(logits, tokens[0, 1:], reduction="none")))
    True
    """
    if lens._unembedding is None:
        lens._unembedding = Unembedding.of(lens)
    with torch.no_grad():
        return lens._unembedding.losses(final, targets)
