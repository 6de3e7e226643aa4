"""Metrics of a run's logits that measure the effects of patching: a logit difference, the loss, or a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phaselens.errors import (
    InputError,
    is_whole,
    require_function,
    require_tensor,
    require_text,
    require_whole,
    short_form,
)
from phaselens.lens.info import require_lens
from phaselens.patching.prompts import token_text
from phaselens.patching.wording import count_phrase

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

LogitFunction = Callable[["Tensor"], "Tensor"]
"""A function of logits [batch, pos, d_vocab] that returns [batch]."""


@dataclass(frozen=True)
class LogitMetric:
    """A number for each row of a batch of logits.

    `compute` takes logits [batch, pos, d_vocab], in float32 or wider, and the tokens [1, pos] of all rows, and returns
    [batch]. `code` is the call that recreates it in a script, or None; `function` is the caller's function that it
    wraps, if any. `shortest` is the smallest number of tokens for which the metric is defined.
    """

    name: str
    compute: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    code: str | None = field(default=None, repr=False)
    function: LogitFunction | None = field(default=None, repr=False)
    shortest: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        require_text("name", self.name)
        require_function("compute", self.compute)
        if self.code is not None:
            require_text("code", self.code)
        if self.function is not None:
            require_function("function", self.function)
        require_whole("shortest", self.shortest, 1)

    def misfit(self, n_tokens: int) -> str | None:
        """Return the reason why a prompt of `n_tokens` tokens does not have the metric, or None if it does."""
        if n_tokens >= self.shortest:
            return None
        return (
            f"{self.name} needs a prompt of {self.shortest} tokens or more, and this one has "
            f"{count_phrase(n_tokens, 'token')}"
        )

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Compute the metric [batch] of logits [batch, pos, d_vocab].

        Raises:
            InputError: where `compute` does not return one number per row.
        """
        import torch

        require_tensor("logits", logits, "batch", "pos", "d_vocab")
        values = self.compute(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens)
        if not isinstance(values, torch.Tensor) or values.shape != logits.shape[:1]:
            received = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise InputError(
                f"metric {self.name}: expected one number per row, [{logits.shape[0]}], received {received}; "
                "reduce over positions and tokens only"
            )
        return values


def logit_diff(lens: HookedTransformer, a: str | int, b: str | int, pos: int = -1) -> LogitMetric:
    """Create the metric logit of token `a` minus logit of token `b`, at position `pos` (by default the last).

    Args:
        lens: the model whose tokens `a` and `b` are.
        a: a text of one token (mind the leading space), or a token id.
        b: the same, for the token whose logit is subtracted.
        pos: the position whose next token is predicted; negative from the end.

    Raises:
        InputError: for a text of several tokens, which it lists.

    >>> from phaselens.testing import tiny_lens
    >>> logit_diff(tiny_lens(), "a", "b").name
    "logit_diff('a', 'b')"
    """
    if not is_whole(pos):
        raise InputError(f"logit_diff: pos={short_form(pos)}; give one position, a whole number")
    require_lens("lens", lens)
    pos = int(pos)
    id_a, id_b = token_id(lens, a), token_id(lens, b)
    if id_a == id_b:
        raise InputError(f"logit_diff: {a!r} and {b!r} are the same token; give two different tokens")
    pos_argument = "" if pos == -1 else f", pos={pos}"

    def compute(logits: Tensor, _tokens: Tensor) -> Tensor:
        if not -logits.shape[1] <= pos < logits.shape[1]:
            raise InputError(f"logit_diff: pos {pos}, but the prompt has {logits.shape[1]} tokens")
        return logits[:, pos, id_a] - logits[:, pos, id_b]

    return LogitMetric(
        f"logit_diff({token_text(lens, id_a)}, {token_text(lens, id_b)}{pos_argument})",
        compute,
        f"logit_diff(lens, {id_a}, {id_b}{pos_argument})",
        shortest=pos + 1 if pos >= 0 else -pos,
    )


def token_id(lens: HookedTransformer, token: str | int) -> int:
    """Return the id of a text that is one token.

    Raises:
        InputError: with its tokens, for a text of none or several.
    """
    if is_whole(token):
        number = int(token)
        if not 0 <= number < lens.info.d_vocab:
            raise InputError(f"token {number}: {lens.info.label} has tokens 0 to {lens.info.d_vocab - 1}")
        return number
    if not isinstance(token, str):
        raise InputError(f"expected a token as a text or an id, received {short_form(token)}")
    if lens.text_tokenizer is None:
        raise InputError(f"model {lens.info.label!r} has no tokenizer; give token ids")
    ids = lens.encoder("never")(token)
    if len(ids) != 1:
        tokens = " ".join(token_text(lens, number) for number in ids) or "no token"
        raise InputError(
            f"{token!r} is {len(ids)} tokens for {lens.info.label}: {tokens}; name a text of one token"
        )
    return int(ids[0])


def _mean_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    require_tensor("tokens", tokens, "1", "pos")
    if logits.shape[1] < 2:
        raise InputError("loss: the prompt has one token, so none is predicted")
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = tokens[:, 1:].expand(logits.shape[0], -1)
    return -log_probabilities.gather(-1, targets[..., None])[..., 0].mean(-1)


#: Mean loss of a prompt's tokens except the first, in nats per token.
loss = LogitMetric("loss", _mean_loss, "loss", shortest=2)


def as_metric(metric: LogitMetric | LogitFunction) -> LogitMetric:
    """Return `metric` as a `LogitMetric`; a function of logits is wrapped in one.

    Raises:
        InputError: for anything else.
    """
    if isinstance(metric, LogitMetric):
        return metric
    if callable(metric):
        function = metric
        name = getattr(function, "__name__", "metric")
        return LogitMetric(name, lambda logits, _tokens: function(logits), function=function)
    raise InputError(
        f"expected a metric as logit_diff(…), loss or a function of logits, received {short_form(metric)}"
    )
