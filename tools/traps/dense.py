"""A model without PhaseLens: every activation of a text in float64, with attention as a dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: The name under which `dense_attention` is registered with transformers.
_IMPLEMENTATION = "traps-dense"
#: Changes the queries and keys [batch, head, pos, d_head] of a layer.
StatesEdit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DenseText:
    """The activations of one text, float64; keys and values are repeated over the heads that share them.

    q, k, v and q_pre, k_pre (before the rotation) [layer, head, pos, d_head]; pattern [layer, head, query, key];
    attention, mlp and residual (after the layer) [layer, pos, d_model]; logits [pos, token].
    `last_state` [pos, d_model] is the last of Hugging Face's `hidden_states`.
    """

    ids: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    q_pre: Tensor
    k_pre: Tensor
    pattern: Tensor
    attention: Tensor
    mlp: Tensor
    residual: Tensor
    last_state: Tensor
    logits: Tensor

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def losses(self) -> Tensor:
        """The loss of each predicted token [pos − 1], in nats."""
        return token_losses(self.logits, self.ids)


def token_losses(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the loss [pos − 1] of each token but the first, from logits [pos, token]."""
    targets = torch.tensor(ids[1:])
    return -logits[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@dataclass
class _Settings:
    """What the attention of a model does besides its own computation."""

    is_causal: bool = True
    edit: StatesEdit | None = None
    captured: dict[str, list[Tensor]] = field(default_factory=dict)


def softmax_attention(q: Tensor, k: Tensor, scale: float, *, is_causal: bool = True) -> Tensor:
    """Return the attention matrix [..., query, key] of q, k [..., pos, d_head]."""
    scores = q @ k.transpose(-1, -2) * scale
    if is_causal:
        n_queries, n_keys = scores.shape[-2:]
        visible = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


def dense_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention as a dense matrix, for transformers' AttentionInterface."""
    settings: _Settings = vars(module)["traps"]
    if settings.edit is not None:
        q, k = settings.edit(int(module.layer_idx), q, k)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    pattern = softmax_attention(q, k, scaling, is_causal=settings.is_causal)
    for name, value in (("q", q), ("k", k), ("v", v), ("pattern", pattern)):
        settings.captured.setdefault(name, []).append(value[0])
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


class DenseModel:
    """A Llama-like Hugging Face model in float64. Nothing of PhaseLens runs in it."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_IMPLEMENTATION, dense_attention)
        self.model = model.double().eval()
        self.model.set_attn_implementation(_IMPLEMENTATION)
        self.layers = list(self.model.model.layers)
        self._settings = _Settings()
        for layer in self.layers:
            vars(layer.self_attn)["traps"] = self._settings

    @classmethod
    def load(cls, folder: str) -> DenseModel:
        """Load a checkpoint."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))

    @property
    def scale(self) -> float:
        """The factor of q · k."""
        return float(self.layers[0].self_attn.scaling)

    def output_weight(self, layer: int) -> Tensor:
        """Return W_O [head, d_head, d_model]."""
        attention = self.layers[layer].self_attn
        return attention.o_proj.weight.detach().T.unflatten(0, (-1, attention.head_dim))

    @contextmanager
    def changed(self, *, is_causal: bool = True, edit: StatesEdit | None = None) -> Iterator[None]:
        """Run forwards inside without the causal mask, or with edited queries and keys."""
        self._settings.is_causal, self._settings.edit = is_causal, edit
        try:
            yield
        finally:
            self._settings.is_causal, self._settings.edit = True, None

    @torch.no_grad()
    def forward(self, ids: Sequence[int], *, unembed: bool = True) -> DenseText:
        """Run one text and return its activations, without logits unless `unembed`."""
        captured = self._settings.captured = {}
        with ExitStack() as stack:
            for layer in self.layers:
                for name, module in (
                    ("q_pre", layer.self_attn.q_proj),
                    ("k_pre", layer.self_attn.k_proj),
                    ("attention", layer.self_attn.o_proj),
                    ("mlp", layer.mlp),
                    ("residual", layer),
                ):
                    handle = module.register_forward_hook(_collecting(captured.setdefault(name, [])))
                    stack.callback(handle.remove)
            run = self.model if unembed else self.model.model
            output = run(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
        stacked = {name: torch.stack(tensors) for name, tensors in captured.items()}
        d_head = self.layers[0].self_attn.head_dim
        for name in ("q_pre", "k_pre"):
            stacked[name] = stacked[name].unflatten(-1, (-1, d_head)).transpose(1, 2)
        group = stacked["q_pre"].shape[1] // stacked["k_pre"].shape[1]
        stacked["k_pre"] = stacked["k_pre"].repeat_interleave(group, 1)
        logits = output.logits[0] if unembed else torch.empty(0, 0)
        return DenseText(list(ids), logits=logits, last_state=output.hidden_states[-1][0], **stacked)

    @torch.no_grad()
    def losses_without_bos_mlp(self, ids: Sequence[int], layer: int) -> Tensor:
        """Return the losses [pos − 1] with the MLP's output at position 0 of a layer set to zero."""

        def silence(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(output[:, :1]), output[:, 1:]], 1)

        handle = self.layers[layer].mlp.register_forward_hook(silence)
        try:
            return token_losses(self.model(torch.tensor([list(ids)]), use_cache=False).logits[0], ids)
        finally:
            handle.remove()


def _collecting(tensors: list[Tensor]) -> Callable[[nn.Module, object, Any], None]:
    def collect(_module: nn.Module, _args: object, output: Any) -> None:
        tensors.append((output[0] if isinstance(output, tuple) else output)[0])

    return collect
