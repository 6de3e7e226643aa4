"""Whether a model predicts texts better without the rotation that its configuration asks for.

Some checkpoints without positions name a rotary model type, because they were trained with the rotation patched away.
Their configuration, and so every forward, then adds a rotation that the weights have never seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from phaselens.data import Text, texts_from
from phaselens.errors import RefusedModel
from phaselens.uncertainty import paired_interval

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_N_TEXTS = 24
_MAX_TOKENS = 128
# A smaller change of the loss says nothing about how a model was trained.
_FEWEST_NATS = 0.01


@dataclass(frozen=True)
class NulledLoss:
    """Mean losses over texts, in nats per token.

    Attributes:
        configured: with the rotation of the configuration.
        nulled: with the rotation of every layer nulled.
        low, high: the 95 % interval over texts of nulled − configured.
        uniform: the loss of the uniform distribution over the vocabulary.
        n_texts: the number of texts.
    """

    configured: float
    nulled: float
    low: float
    high: float
    uniform: float
    n_texts: int

    @property
    def looks_like_nope(self) -> bool:
        """Whether the model is better without the rotation, by more than chance, and better than guessing."""
        return self.high < -_FEWEST_NATS and self.nulled < self.uniform

    def __str__(self) -> str:
        return (
            f"loss on {self.n_texts} bundled texts: {self.configured:.3f} nats per token with the rotation as "
            f"configured, {self.nulled:.3f} with the rotation nulled"
        )


def compare_nulled_loss(lens: HookedTransformer, texts: Sequence[Text] | None = None) -> NulledLoss | str:
    """Return the loss on texts with the rotation as configured and nulled, or the reason why there are not two.

    Args:
        lens: the model; the state of its rotation does not matter, and is restored.
        texts: the first tokens of each are used; by default, of some bundled texts.

    >>> from phaselens.testing import tiny_lens
    >>> compare_nulled_loss(tiny_lens("gpt2"))
    'no layer rotates queries and keys'
    """
    if lens.text_tokenizer is None:
        return "there is no tokenizer for the texts"
    sequences = _token_ids(lens, texts_from("bundled", _N_TEXTS) if texts is None else texts)
    if len(sequences) < 2:
        return "fewer than two texts have two tokens"
    with lens.nulled_rotation([]):
        if not any("rope" in encoding for encoding in lens.info.positions):
            return "no layer rotates queries and keys"
        configured = [_loss(lens, ids) for ids in sequences]
    try:
        with lens.nulled_rotation():
            nulled = [_loss(lens, ids) for ids in sequences]
    except RefusedModel as refusal:
        return str(refusal)
    if not all(map(math.isfinite, (*configured, *nulled))):
        return "the loss is not a finite number"
    _, low, high = paired_interval(nulled, configured)
    return NulledLoss(
        math.fsum(configured) / len(configured),
        math.fsum(nulled) / len(nulled),
        float(low),
        float(high),
        math.log(lens.info.d_vocab),
        len(sequences),
    )


def _token_ids(lens: HookedTransformer, texts: Sequence[Text]) -> list[torch.Tensor]:
    """Return the first ids [1, pos] of each text that has at least two."""
    encoder = lens.encoder()
    limit = min(_MAX_TOKENS, lens.info.n_ctx or _MAX_TOKENS)
    tokenized = [encoder.tokenize(text, limit) for text in texts]
    return [torch.tensor(text.ids, device=lens.device)[None] for text in tokenized if len(text.ids) > 1]


def _loss(lens: HookedTransformer, ids: torch.Tensor) -> float:
    """Return the mean cross-entropy of a text's tokens after the first, in nats."""
    logits = lens.stream(ids, unembed=True)[0, :-1]
    return float(functional.cross_entropy(logits.double(), ids[0, 1:].to(logits.device)))
