"""Contexts in which forwards from one residual share what one layer's attention computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformer_lens.model_bridge import TransformerBridge

from phaselens.errors import InputError, require_whole
from phaselens.lens.components import AttentionReplay, KernelReplay, StreamingAttention, attention_of
from phaselens.lens.ownership import OwnedContext

if TYPE_CHECKING:
    from phaselens.lens.info import ModelInfo


class ReplaysAttention(TransformerBridge):
    """The part of `HookedTransformer` that keeps results of a layer's attention between forwards."""

    info: ModelInfo

    def attention_replay(self, layer: int) -> OwnedContext:
        """Return a context that computes the attention of `layer` once and reuses its output in all later forwards.

        Use it for forwards that start from one residual and change nothing before that output. It can be entered again.

        Raises:
            InputError: for a layer that does not exist, and inside, for a residual of another shape.

        >>> import phaselens, torch
        >>> from phaselens.testing import tiny_model
        >>> lens = phaselens.load(tiny_model("llama"))
        >>> residual = lens.stream(torch.tensor([[0, 5, 7, 9]]), stop_at_layer=1)
        >>> with lens.attention_replay(1):
        ...     first, second = (lens.stream(residual=residual, start_at_layer=1) for _ in range(2))
        >>> bool(torch.equal(first, second))
        True
        """
        attention = self._attention_of("attention_replay", layer)
        replay = AttentionReplay(attention if self.blocks[layer].returns_attn_out() else None)
        return OwnedContext(self, replay.active, yields_itself=True)

    def kernel_replay(self, layer: int) -> OwnedContext:
        """Return a context that runs the kernels of `layer` once; see `KernelReplay`. InputError as above."""
        replay = KernelReplay(self._attention_of("kernel_replay", layer))
        return OwnedContext(self, replay.active, yields_itself=True)

    def _attention_of(self, method: str, layer: int) -> StreamingAttention | None:
        """Return the attention of a layer, None if it has something else; InputError for a layer out of range."""
        require_whole("layer", layer)
        if not 0 <= layer < self.info.n_layers:
            raise InputError(f"{method}({layer}): {self.info.label} has layers 0 to {self.info.n_layers - 1}")
        return attention_of(self.blocks[layer])
