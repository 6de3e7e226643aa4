"""The loss of each token from the final norm's output, with logits in pieces of the vocabulary.

A matrix [tokens, vocabulary] takes gigabytes at 128 k entries. The loss needs only two numbers per token: the
log-sum-exp of its logits and the target's logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.blocks import original_module
from phaselens.lens.placement import parameter_of
from phaselens.lens.weights import dense_weight

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

#: The largest number of logits in memory at one time: 64 MB of float32.
_MAX_LOGITS = 2**24
#: The largest accepted distance of log-probabilities from the model's own, in units of the dtype's rounding.
_MAX_ROUNDINGS = 256


@dataclass(frozen=True)
class TokenLosses:
    """`loss` [tokens] in nats, float32 (float64 in a float64 model); `top` [tokens], the likeliest tokens' ids.

    `divergence` [tokens], float64, is the Kullback–Leibler divergence of the predictions from reference predictions in
    nats, KL(reference ‖ predictions); None without a reference.
    """

    loss: Tensor
    top: Tensor
    divergence: Tensor | None = None


@dataclass(frozen=True)
class Unembedding:
    """The map from the final norm's output to logits: a matrix, perhaps a bias, a factor and a soft cap."""

    weight: Tensor
    bias: Tensor | None
    factor: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, lens: HookedTransformer) -> Unembedding:
        """Return the unembedding of this model, checked on a few of its tokens.

        Raises:
            RefusedModel: if the model computes its logits in another way.
        """
        model = lens.original_model
        module = families.unembedding_of(model)
        weight = parameter_of(module, "weight")
        if isinstance(weight, Tensor) and module is not None:
            # What a quantised or adapted module multiplies by is not the tensor that it stores.
            like = torch.empty(0, dtype=lens.dtype, device=weight.device)
            dense = dense_weight(original_module(module), lens.info.d_model, like)
            weight = weight if dense is None else dense
        if not isinstance(weight, Tensor):
            raise RefusedModel(
                f"{lens.info.label}: {type(model).__name__} has no lm_head; its loss cannot be computed"
            )
        unembedding = cls(
            weight,
            parameter_of(module, "bias"),
            families.logit_factor_of(model),
            families.logit_softcap_of(model),
        )
        unembedding._require_exact(lens)
        return unembedding

    def logits(self, final: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return logits [..., stop − start] of the ids `start` to `stop` − 1, rounded as in the model, then float32."""
        bias = None if self.bias is None else self.bias[start:stop]
        logits = functional.linear(final.to(self.weight), self.weight[start:stop], bias)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(
        self, final: Tensor, targets: Tensor, reference: ReferencePredictions | None = None
    ) -> TokenLosses:
        """Return the cross-entropy of `targets` [tokens], given the final norm's output `final` [tokens, d_model], and
        with a `reference` for the same tokens also the divergence from it."""
        n_tokens, n_entries = len(final), len(self.weight)
        targets = targets.to(self.weight.device)
        # A divergence takes further tensors of the same size, in float64.
        step = max(1, _MAX_LOGITS // max(1, n_tokens * (1 if reference is None else 4)))
        mean_growth = mean_change = torch.zeros(n_tokens, dtype=torch.float64, device=self.weight.device)
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        log_sum = torch.full((n_tokens,), -torch.inf, dtype=dtype, device=self.weight.device)
        largest, target_logit = log_sum, torch.zeros_like(log_sum)
        top = torch.zeros(n_tokens, dtype=torch.long, device=self.weight.device)
        for start in range(0, n_entries, step):
            logits = self.logits(final, start, start + step)
            piece_largest, piece_top = logits.max(-1)
            is_larger = piece_largest > largest
            largest = torch.where(is_larger, piece_largest, largest)
            top = torch.where(is_larger, piece_top + start, top)
            index = targets - start
            in_piece = (index >= 0) & (index < logits.shape[-1])
            piece_logit = logits.gather(-1, torch.where(in_piece, index, 0)[:, None])[:, 0]
            target_logit = torch.where(in_piece, piece_logit, target_logit)
            if reference is not None:
                probability, change = reference.compare(logits, start)
                mean_growth = mean_growth + (probability * change.expm1()).sum(-1)
                mean_change = mean_change + (probability * change).sum(-1)
            # In place, and with the maximum that is known already; logsumexp would compute it again.
            shift = piece_largest.masked_fill(piece_largest.isinf(), 0.0)
            log_sum = torch.logaddexp(log_sum, logits.sub_(shift[:, None]).exp_().sum(-1).log() + shift)
        # With d the change of a logit and p the reference: ln Σ p e^d − Σ p d, which is exact where d is small, too.
        divergence = None if reference is None else mean_growth.log1p() - mean_change
        return TokenLosses(log_sum - target_logit, top, divergence)

    def _require_exact(self, lens: HookedTransformer) -> None:
        """Raise RefusedModel unless the logits of a few tokens are the model's own."""
        tokens = torch.arange(min(4, lens.info.d_vocab))[None]
        with torch.no_grad():
            own_logits = lens.stream(tokens, unembed=True)[0]
            expected = own_logits.double().log_softmax(-1)
            computed = self.logits(lens.stream(tokens)[0]).double().log_softmax(-1).to(expected.device)
        # NaN weights give NaN both ways, which does not show how logits are computed. Losses are then missing.
        is_number = ~(expected.isnan() & computed.isnan())
        expected, computed = torch.where(is_number, expected, 0.0), torch.where(is_number, computed, 0.0)
        eps = _rounding_of(self.weight.dtype, own_logits.dtype)
        limit = _MAX_ROUNDINGS * eps * max(1.0, float(expected.abs().max()))
        largest_gap = float((expected - computed).abs().max())
        if not largest_gap <= limit:
            raise RefusedModel(
                f"{lens.info.label}: its logits are not final norm × lm_head, scaled and capped as configured "
                f"(off by {largest_gap:.3g}, at most {limit:.3g} is allowed); its loss cannot be computed in pieces"
            )


@dataclass(frozen=True)
class ModuleHead:
    """The modules that map the body's output to logits, one after the other, and a factor of the last one's output."""

    modules: tuple[nn.Module, ...]
    factor: float

    @classmethod
    def from_model(cls, lens: HookedTransformer) -> ModuleHead:
        """Return the head of this model, with the factor that makes its output the model's own logits.

        Raises:
            RefusedModel: if no factor does.
        """
        tokens = torch.arange(min(4, lens.info.d_vocab))[None]
        with torch.no_grad():
            own_logits = lens.stream(tokens, unembed=True)[0]
            expected = own_logits.double()
            head = cls(tuple(map(lens.original_model.get_submodule, lens.head_paths)), 1.0)
            computed = head.logits(lens.stream(tokens)[0]).double().to(expected.device)
        factor = 1.0
        if not torch.equal(expected, computed):
            factor = float((expected * computed).sum() / computed.pow(2).sum())
        eps = _rounding_of(lens.dtype, own_logits.dtype)
        limit = _MAX_ROUNDINGS * eps * float(expected.abs().max())
        largest_gap = float((expected - factor * computed).abs().max())
        if not largest_gap <= limit:
            names = " and ".join(lens.head_paths)
            raise RefusedModel(
                f"{lens.info.label}: its logits are not the output of {names}, times a factor (off by "
                f"{largest_gap:.3g}, at most {limit:.3g} is allowed); its loss cannot be computed"
            )
        return cls(head.modules, factor)

    def logits(self, final: Tensor) -> Tensor:
        """Return logits [tokens, d_vocab] of the body's output [tokens, d_model], in float32 or wider."""
        outputs = final[None]
        for module in self.modules:
            outputs = module(outputs)
        logits = outputs[0] * self.factor
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(
        self, final: Tensor, targets: Tensor, reference: ReferencePredictions | None = None
    ) -> TokenLosses:
        """Return the cross-entropy of `targets` [tokens], given the body's output `final` [tokens, d_model], and with a
        `reference` for the same tokens also the divergence from it."""
        losses, tops, divergences = [], [], []
        n_ids = self.logits(final[:1]).shape[-1]
        step = max(1, _MAX_LOGITS // (n_ids * (1 if reference is None else 4)))
        for start in range(0, len(final), step):
            piece = slice(start, start + step)
            logits = self.logits(final[piece])
            losses.append(
                functional.cross_entropy(logits, targets[piece].to(logits.device), reduction="none")
            )
            tops.append(logits.argmax(-1))
            if reference is not None:
                divergences.append(_divergence(self.logits(reference.final[piece]), logits))
        if not losses:
            return TokenLosses(final.new_zeros(0), targets.new_zeros(0))
        divergence = None if reference is None else torch.cat(divergences)
        return TokenLosses(torch.cat(losses), torch.cat(tops), divergence)


def _rounding_of(weights: torch.dtype, logits: torch.dtype) -> float:
    """Return the relative rounding of a model's logits: a float64 model may convert them to float32 (Mamba 2)."""
    return max(torch.finfo(weights).eps, torch.finfo(logits).eps)


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference ‖ predictions) [tokens] in nats, float64, from logits [tokens, id]."""
    change = logits.double() - reference.double()
    probability = reference.double().softmax(-1)
    # The same sum as in `Unembedding.losses`.
    return (probability * change.expm1()).sum(-1).log1p() - (probability * change).sum(-1)


class ReferencePredictions:
    """The predictions of the unedited model for some tokens, from the final norm's output `final` [tokens, d_model].

    Logits are kept if they fit into memory, and else computed again for each comparison.
    """

    def __init__(self, lens: HookedTransformer, final: Tensor) -> None:
        unembedding = unembedding_of(lens)
        self.final = final
        if isinstance(unembedding, ModuleHead):
            return  # its logits are computed token by token, in both runs
        self._unembedding = unembedding
        with torch.no_grad():
            n_entries = len(self._unembedding.weight)
            step = max(1, _MAX_LOGITS // max(1, 2 * len(final)))
            self._log_total = torch.full((len(final), 1), -torch.inf, dtype=torch.float64)
            self._log_total = self._log_total.to(self._unembedding.weight.device)
            for start in range(0, n_entries, step):
                logits = self._unembedding.logits(final, start, start + step).double()
                self._log_total = torch.logaddexp(self._log_total, logits.logsumexp(-1, keepdim=True))
            fits = len(final) * n_entries <= _MAX_LOGITS
            self._logits = self._unembedding.logits(final) if fits else None

    def compare(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return the reference's probabilities of the ids from `start` on, and the change of their logits to `logits`,
        both [tokens, id] in float64."""
        stop = start + logits.shape[-1]
        reference = (
            self._unembedding.logits(self.final, start, stop)
            if self._logits is None
            else self._logits[:, start:stop]
        ).double()
        return (reference - self._log_total).exp(), logits.double() - reference


def unembedding_of(lens: HookedTransformer) -> Unembedding | ModuleHead:
    """Return the model's unembedding, which is checked once."""
    if lens._unembedding is None:
        lens._unembedding = _unembedding_of(lens)
    return lens._unembedding


def _unembedding_of(lens: HookedTransformer) -> Unembedding | ModuleHead:
    try:
        return Unembedding.from_model(lens)
    except RefusedModel:
        if not lens.head_paths:
            raise
    return ModuleHead.from_model(lens)


def token_losses(
    lens: HookedTransformer, final: Tensor, targets: Tensor, reference: ReferencePredictions | None = None
) -> TokenLosses:
    """Return the cross-entropy of each target, without a matrix [tokens, vocabulary].

    Args:
        lens: the model.
        final: [tokens, d_model], the final norm's output at the positions that predict the targets.
        targets: [tokens], ids.
        reference: predictions for the same tokens, from which the divergence is measured.

    Returns:
        Nats per token, the token that the model holds most likely, and with a reference the divergence from it.

    >>> import phaselens
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tokens = torch.tensor([[0, 5, 7, 9]])
    >>> losses = token_losses(lens, lens.stream(tokens)[0, :-1], tokens[0, 1:])
    >>> logits = lens.stream(tokens, unembed=True)[0, :-1]
    >>> bool(torch.allclose(losses.loss, functional.cross_entropy(logits, tokens[0, 1:], reduction="none")))
    True
    """
    with torch.no_grad():
        return unembedding_of(lens).losses(final, targets, reference)
