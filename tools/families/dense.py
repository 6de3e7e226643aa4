"""Dense attention of an unwrapped model: the scores of its own eager forward in float64, recorded at its softmax.

Nothing here uses the lens. Every family computes its eager attention with a call of softmax (or of
scaled_dot_product_attention) on the scores of all queries and keys, to which masks and biases have been added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class RecordedAttention:
    """One attention of a model's forward.

    ``layer`` is the index in the stack of layers that contains it, ``module`` its qualified name. ``scores`` [batch,
    head, query, key] are those that enter the softmax, −inf where hidden; ``sink_column`` [batch, head, query] is the
    score of one more column, which has no key; or None.
    """

    layer: int
    module: str
    scores: Tensor
    sink_column: Tensor | None

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the rows, [batch, head, query]."""
        lse = self.scores.logsumexp(-1)
        return lse if self.sink_column is None else torch.logaddexp(lse, self.sink_column)

    @property
    def learned_sink(self) -> Tensor:
        """Share of the attention on the column without a key, [batch, head, query]; 0 without one."""
        if self.sink_column is None:
            return torch.zeros_like(self.lse)
        return (self.sink_column - self.lse).exp()

    @property
    def pattern(self) -> Tensor:
        """Attention [batch, head, query, key] after the softmax."""
        return (self.scores - self.lse[..., None]).exp()


def dense_attention(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, list[RecordedAttention]]:
    """Run an eager model in float64; return its logits, and its attention in the order of computation."""
    recorder = _SoftmaxRecorder(*tokens.shape)
    # Constants that a forward creates are of the default dtype (XGLM's smallest number).
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _following(model, recorder), recorder:
            logits = model(tokens, use_cache=False).logits
    finally:
        torch.set_default_dtype(default_dtype)
    return logits, recorder.attentions


class _SoftmaxRecorder(TorchFunctionMode):
    """Records the scores of every softmax over keys inside the layers, and computes it in the scores' own dtype."""

    def __init__(self, n_texts: int, n_tokens: int) -> None:
        super().__init__()
        self.attentions: list[RecordedAttention] = []
        self.running: list[tuple[str, nn.Module]] = []
        self._n_texts, self._n_tokens = n_texts, n_tokens
        self._shifted: tuple[Tensor | None, Tensor | float] = (None, 0.0)
        self._was_summed = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        if func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            if self._is_over_keys(scores, args[1] if len(args) > 1 else kwargs.get("dim")):
                difference, shift = self._shifted
                self._record(scores + shift if scores is difference else scores)
                return scores.softmax(-1)
        elif name in ("sub", "logsumexp") and isinstance(args[0], Tensor) and self._is_over_keys(args[0], -1):
            result = func(*args, **kwargs)
            if name == "logsumexp":
                self._was_summed = True
            elif isinstance(args[1], Tensor) and args[1].shape[-1:] == (1,):
                # A row's maximum, which some families subtract before the softmax.
                self._shifted = result, args[1]
            return result
        elif func is torch.nn.functional.scaled_dot_product_attention:
            self._record(_scores_of_call(*args, **kwargs))
        return func(*args, **kwargs)

    def _is_over_keys(self, scores: Tensor, dim: int | None) -> bool:
        return (
            bool(self.running)
            and _layer_of(self.running[-1][0]) is not None
            and dim in (-1, scores.dim() - 1)
            and scores.dim() in (3, 4)
            and scores.shape[-2] == self._n_tokens
            and scores.shape[-1] in (self._n_tokens, self._n_tokens + 1)
            and scores.shape[:-2].numel() % self._n_texts == 0
        )

    def _record(self, scores: Tensor) -> None:
        name, module = self.running[-1]
        layer = next(index for index in (_layer_of(outer) for outer, _ in self.running) if index is not None)
        scores = scores.detach().reshape(self._n_texts, -1, *scores.shape[-2:]).double()
        sink_column = None
        if scores.shape[-1] == self._n_tokens + 1:
            scores, sink_column = scores[..., :-1], scores[..., -1]
        elif self._was_summed:
            # Granite multiplies attention by sigmoid(lse − sink), which is what the column of a sink logit does.
            logits = [value for value in module.parameters(recurse=False) if value.shape == scores.shape[1:2]]
            sink_column = logits[0].double()[None, :, None].expand(scores.shape[:-1])
        self._was_summed = False
        hidden = scores <= torch.finfo(torch.float32).min / 2
        scores = scores.masked_fill(hidden, -torch.inf)
        self.attentions.append(RecordedAttention(layer, name, scores, sink_column))


def _layer_of(name: str) -> int | None:
    """Return the index in the qualified name of a module, `model.layers.3.self_attn`; None outside of the layers."""
    match = _INDEX.search(name)
    return int(match[1]) if match else None


def _scores_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the scores of a call of scaled_dot_product_attention."""
    groups = query.shape[-3] // key.shape[-3]
    key = key.repeat_interleave(groups, dim=-3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask


@contextmanager
def _following(model: PreTrainedModel, recorder: _SoftmaxRecorder) -> Iterator[None]:
    """Keep the modules that are running in `recorder.running`, innermost last."""
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, name=name: recorder.running.append((name, module))
            )
        )
        handles.append(module.register_forward_hook(lambda *_: (recorder.running.pop(), None)[1]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
