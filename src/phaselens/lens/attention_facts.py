"""Facts of one layer's attention: sizes, and the options of its softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from phaselens.lens import families
from phaselens.lens.interface_calls import InterfaceCall


@dataclass(frozen=True, eq=False)
class AttentionFacts:
    """Facts of one layer's attention.

    ``d_head`` is the size of one head's query, ``d_value`` that of its value. ``scale`` is the factor of q·k,
    ``softcap`` the bound c of scores c·tanh(score / c), and ``sink_logits`` [n_heads] are one more term each of the
    softmax's sum; the last two are None without one. ``selects`` tells whether an indexer
    selects the keys of each query.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    selects: bool = False

    @classmethod
    def of_call(cls, call: InterfaceCall) -> AttentionFacts:
        """Return the facts that one call of the attention interface shows."""
        return cls(
            n_heads=call.query.shape[1],
            n_kv_heads=call.key.shape[1],
            d_head=call.query.shape[-1],
            d_value=call.value.shape[-1],
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            selects=call.selects,
        )

    @classmethod
    def of_module(cls, attention: nn.Module) -> AttentionFacts:
        """Return the facts that the attributes of an attention module state."""
        d_head = families.d_head_of(attention)
        return cls(
            n_heads=families.n_heads_of(attention),
            n_kv_heads=families.n_kv_heads_of(attention),
            d_head=d_head,
            d_value=d_head,
            scale=families.scale_of(attention),
            softcap=families.softcap_of(attention),
            sink_logits=families.sink_logits_of(attention),
        )
