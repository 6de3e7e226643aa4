"""What patching is judged by: one number of a run's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.errors import (
    InputError,
    is_whole,
    require_function,
    require_tensor,
    require_text,
    require_whole,
)
from phaselens.lens.info import require_lens
from phaselens.patching.points import brief, counted
from phaselens.patching.prompts import token_text

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


@dataclass(frozen=True)
class LogitMetric:
    """A number of each row of a batch of logits.

    `compute` takes logits [batch, pos, d_vocab], in float32 or wider, and the tokens [1, pos] that all rows were run
    on, and gives [batch]. `code` is what makes it again in a script, or None; `function` is the caller's own function
    that it was made of. `shortest` is how many tokens a prompt must have for it.
    """

    name: str
    compute: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    code: str | None = field(default=None, repr=False)
    function: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
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
        """Why a prompt of `n_tokens` tokens has no such number, or None where it has."""
        if n_tokens >= self.shortest:
            return None
        needed, tokens = f"{self.shortest} tokens or more", counted(n_tokens, "token")
        return f"{self.name} needs a prompt of {needed}, and this one has {tokens}"

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[batch], of logits [batch, pos, d_vocab].

        Raises:
            InputError: where `compute` gives something else than one number a row.
        """
        import torch

        require_tensor("logits", logits, "batch", "pos", "d_vocab")
        given = self.compute(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens)
        if not isinstance(given, torch.Tensor) or given.shape != logits.shape[:1]:
            found = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise InputError(
                f"metric {self.name}: expected one number a row, [{logits.shape[0]}], got {found}; "
                "reduce over positions and tokens only"
            )
        return given


def logit_diff(lens: HookedTransformer, a: str | int, b: str | int, pos: int = -1) -> LogitMetric:
    """Logit of token `a` minus that of `b`, at position `pos` (by default the last).

    Args:
        lens: the model whose tokens they are.
        a, b: each a text that is one token (mind the leading space), or a token id.
        pos: the position whose next token is asked for; negative from the end.

    Raises:
        InputError: for a text of several tokens, which it lists.

    >>> from phaselens.testing import tiny_lens
    >>> logit_diff(tiny_lens(), "a", "b").name
    "logit_diff('a', 'b')"
    """
    if not is_whole(pos):
        raise InputError(f"logit_diff: pos={brief(pos)}; give one position, a whole number")
    require_lens("lens", lens)
    pos = int(pos)
    first, second = token_id(lens, a), token_id(lens, b)
    if first == second:
        raise InputError(f"logit_diff: {a!r} and {b!r} are the same token; name two")
    at = "" if pos == -1 else f", pos={pos}"

    def compute(logits: Tensor, _tokens: Tensor) -> Tensor:
        if not -logits.shape[1] <= pos < logits.shape[1]:
            raise InputError(f"logit_diff: pos {pos}, but the prompt has {logits.shape[1]} tokens")
        return logits[:, pos, first] - logits[:, pos, second]

    shown = f"logit_diff({token_text(lens, first)}, {token_text(lens, second)}{at})"
    shortest = pos + 1 if pos >= 0 else -pos
    return LogitMetric(shown, compute, f"logit_diff(lens, {first}, {second}{at})", shortest=shortest)


def token_id(lens: HookedTransformer, token: str | int) -> int:
    """The id of a text that is one token.

    Raises:
        InputError: with the tokens that it is, where it is none or several.
    """
    if is_whole(token):
        number = int(token)
        if not 0 <= number < lens.info.d_vocab:
            raise InputError(f"token {number}: {lens.info.label} knows 0 to {lens.info.d_vocab - 1}")
        return number
    if not isinstance(token, str):
        raise InputError(f"a token is a text or an id, got {type(token).__name__}")
    if lens.text_tokenizer is None:
        raise InputError(f"model {lens.info.label!r} has no tokenizer; give token ids")
    ids = lens.encoder("never")(token)
    if len(ids) != 1:
        parts = " ".join(token_text(lens, each) for each in ids) or "no token"
        raise InputError(
            f"{token!r} is {len(ids)} tokens for {lens.info.label}: {parts}; name a text of one token"
        )
    return int(ids[0])


def _mean_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    require_tensor("tokens", tokens, "1", "pos")
    if logits.shape[1] < 2:
        raise InputError("loss: the prompt has one token, so none is predicted")
    logged = logits[:, :-1].log_softmax(-1)
    targets = tokens[:, 1:].expand(logits.shape[0], -1)
    return -logged.gather(-1, targets[..., None])[..., 0].mean(-1)


#: Mean loss of a prompt's own tokens but the first, in nats a token.
loss = LogitMetric("loss", _mean_loss, "loss", shortest=2)


def as_metric(given: Any) -> LogitMetric:
    """A `LogitMetric` as it is; a function of logits [batch, pos, d_vocab] that gives [batch] as one.

    Raises:
        InputError: for anything else.
    """
    if isinstance(given, LogitMetric):
        return given
    if callable(given):
        name = getattr(given, "__name__", "metric")
        return LogitMetric(name, lambda logits, _tokens: given(logits), function=given)
    raise InputError(f"a metric is logit_diff(…), loss or a function of logits, got {type(given).__name__}")
