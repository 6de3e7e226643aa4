"""The discrete choices of a forward, such as the experts of each token: recorded in one forward, repeated in another.

A mixture of experts sends a token to the experts with the largest scores. Two forwards of one model that round
differently (another batch, another kernel) choose differently where scores nearly tie, and their outputs then differ by
far more than rounding. The self-check therefore compares forwards that make the same choices. A choice is repeated only
where it nearly ties with the second forward's own; any other difference stays, and shows in the outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Line = tuple[str, int]
"""A line of code that chooses, as file and number: forwards that differ elsewhere still choose there, in one order."""


@dataclass(frozen=True)
class Choices:
    """The choices of one forward on tokens of shape [n_texts, n_tokens].

    ``by_line`` holds, for each line of code and each time that it ran, the indices of the largest candidates or the
    outcomes of a comparison [text, pos, group, …]; None where the numbers have no axis of tokens.
    """

    n_texts: int
    n_tokens: int
    by_line: dict[Line, list[Tensor | None]] = field(default_factory=dict)

    def of_text(self, text: int, n_tokens: int) -> Choices:
        """Return the choices for the first `n_tokens` tokens of one text."""
        by_line = {
            line: [None if chosen is None else chosen[text : text + 1, :n_tokens] for chosen in calls]
            for line, calls in self.by_line.items()
        }
        return Choices(1, n_tokens, by_line)

    def beside(self, other: Choices) -> Choices:
        """Return the choices of one batch of these texts and, after them, those of `other`, of the same length."""
        by_line = {
            line: [
                None if first is None or second is None else torch.cat([first, second])
                for first, second in zip(calls, other.by_line.get(line, ()), strict=False)
            ]
            for line, calls in self.by_line.items()
        }
        return Choices(self.n_texts + other.n_texts, self.n_tokens, by_line)


@contextmanager
def recorded_choices(tokens: Tensor) -> Iterator[Choices]:
    """Record the choices of the forward on `tokens` [text, pos] that runs inside the context."""
    choices = Choices(*tokens.shape)
    with _Recorder(choices):
        yield choices


@contextmanager
def repeated_choices(choices: Choices | None, limit: float) -> Iterator[None]:
    """Let the forward inside the context choose as recorded, where its own scores nearly tie.

    Args:
        limit: the largest distance of tied scores, relative to the range of the token's scores.
    """
    if choices is None or not choices.by_line:
        yield
        return
    with _Repeater(choices, limit):
        yield


@dataclass(frozen=True)
class _Selection:
    """The indices [..., choice] of the largest of some scores [..., candidate]; `rebuild` makes the call's result."""

    scores: Tensor
    own: Tensor
    rebuild: Callable[[Tensor], Any]

    def near_ties(self, recorded: Tensor, limit: float) -> Tensor:
        """Return [..., 1]: whether the recorded candidates' scores are the largest but for `limit` of the range."""
        if int(recorded.max()) >= self.scores.shape[-1]:
            return torch.zeros_like(recorded[..., :1], dtype=torch.bool)
        finite = self.scores.isfinite()
        highest = self.scores.where(finite, -torch.inf).amax(-1, keepdim=True)
        lowest = self.scores.where(finite, torch.inf).amin(-1, keepdim=True)
        gap = self._lowest_of(self.own) - self._lowest_of(recorded)
        return gap <= limit * (highest - lowest)

    def _lowest_of(self, indices: Tensor) -> Tensor:
        return self.scores.gather(-1, indices).amin(-1, keepdim=True)


@dataclass(frozen=True)
class _Comparison:
    """The outcomes [..., candidate] of comparing numbers with a bound; both have that shape."""

    numbers: Tensor
    bound: Tensor
    own: Tensor

    def near_ties(self, recorded: Tensor, limit: float) -> Tensor:
        """Return [..., candidate]: whether number and bound differ by at most `limit` of the largest of either."""
        gap = (self.numbers - self.bound).abs()
        sizes = torch.maximum(self.numbers.abs(), self.bound.abs())
        return gap <= limit * sizes.where(sizes.isfinite(), 0.0).amax(-1, keepdim=True)

    def rebuild(self, outcomes: Tensor) -> Tensor:
        """Return the result of the call."""
        return outcomes


class _ChoiceMode(TorchFunctionMode):
    """Mode of torch that sees each choice of a forward."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _READERS.get(func)
        if read is None or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return result
        choice = read(args, kwargs or {}, result)
        if choice is None:
            return result
        caller = sys._getframe(1)
        other = self.settle((caller.f_code.co_filename, caller.f_lineno), choice)
        return result if other is None else choice.rebuild(other)

    def settle(self, line: Line, choice: _Selection | _Comparison) -> Tensor | None:
        """Return what to choose instead, or None to leave the choice unchanged."""
        raise NotImplementedError


class _Recorder(_ChoiceMode):
    """Mode that records each choice."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self._choices = choices

    def settle(self, line: Line, choice: _Selection | _Comparison) -> None:
        """Record the choice as one more of its line."""
        own, n_texts, n_tokens = choice.own, self._choices.n_texts, self._choices.n_tokens
        by_token = None
        if own.dim() > 1 and own.shape[:-1].numel() % (n_texts * n_tokens) == 0:
            by_token = own.reshape(n_texts, n_tokens, -1, own.shape[-1])
        self._choices.by_line.setdefault(line, []).append(by_token)


class _Repeater(_ChoiceMode):
    """Mode that replaces each choice by the recorded one, for the tokens where both nearly tie."""

    def __init__(self, choices: Choices, limit: float) -> None:
        super().__init__()
        self._limit = limit
        self._calls = {line: iter(calls) for line, calls in choices.by_line.items()}

    def settle(self, line: Line, choice: _Selection | _Comparison) -> Tensor | None:
        """Return the recorded choice, where it nearly ties with the forward's own; None where nothing changes."""
        own = choice.own
        recorded = next(self._calls.get(line, iter(())), None)
        if recorded is None or recorded.numel() != own.numel() or recorded.shape[-1] != own.shape[-1]:
            return None
        recorded = recorded.reshape(own.shape).to(own.device)
        if torch.equal(recorded, own):
            return None
        return recorded.where(choice.near_ties(recorded, self._limit), own)


def _read_topk(args: Sequence[Any], options: Mapping[str, Any], result: Any) -> _Selection | None:
    scores = args[0]
    dim = options.get("dim", args[2] if len(args) > 2 else -1)
    if not options.get("largest", args[3] if len(args) > 3 else True):
        return None

    def rebuild(indices: Tensor) -> Any:
        indices = indices.movedim(-1, dim)
        return type(result)((scores.gather(dim, indices), indices))

    return _Selection(scores.movedim(dim, -1), result.indices.movedim(dim, -1), rebuild)


def _read_max(args: Sequence[Any], options: Mapping[str, Any], result: Any) -> _Selection | None:
    scores = args[0]
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int):
        return None  # the largest of all values, or of two tensors
    keeps_dim = options.get("keepdim", args[2] if len(args) > 2 else False)
    only_indices = isinstance(result, Tensor)

    def rebuild(indices: Tensor) -> Any:
        indices = indices.movedim(-1, dim)
        values = scores.gather(dim, indices)
        if not keeps_dim:
            values, indices = values.squeeze(dim), indices.squeeze(dim)
        return indices if only_indices else type(result)((values, indices))

    own = result if only_indices else result.indices
    own = own if keeps_dim else own.unsqueeze(dim)
    return _Selection(scores.movedim(dim, -1), own.movedim(dim, -1), rebuild)


def _read_comparison(args: Sequence[Any], options: Mapping[str, Any], result: Any) -> _Comparison | None:
    if not isinstance(result, Tensor) or len(args) < 2:
        return None
    numbers, bound = torch.broadcast_tensors(args[0], torch.as_tensor(args[1], device=args[0].device))
    return _Comparison(numbers, bound, result)


_READERS: dict[Any, Callable[..., _Selection | _Comparison | None]] = {
    **dict.fromkeys((torch.topk, Tensor.topk), _read_topk),
    **dict.fromkeys((torch.max, Tensor.max, torch.argmax, Tensor.argmax), _read_max),
    **{
        getattr(owner, name): _read_comparison
        for owner in (torch, Tensor)
        for name in ("gt", "ge", "lt", "le")
    },
    **{getattr(Tensor, f"__{name}__"): _read_comparison for name in ("gt", "ge", "lt", "le")},
}
