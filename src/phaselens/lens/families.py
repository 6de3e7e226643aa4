"""What differs between model families, where the lens has to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from phaselens.errors import RefusedModel


@dataclass(frozen=True)
class FusedLayout:
    """How one projection's output holds queries, keys and values.

    ``by_head`` False: all queries, then all keys, then all values (GPT-2, Phi-3). True: for each head its query, key
    and value (GPT-NeoX).
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    by_head: bool

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, pos, all] -> q [batch, pos, n_heads, d_head], k and v [batch, pos, n_kv_heads, d_head]."""
        if self.by_head:
            q, k, v = fused.unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)
            return q, k, v
        sizes = [self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head]
        q, k, v = (part.unflatten(-1, (-1, self.d_head)) for part in fused.split(sizes, dim=-1))
        return q, k, v

    def join(self, parts: tuple[Tensor, Tensor, Tensor] | list[Tensor]) -> Tensor:
        """The inverse of `split`; each part may also come back flat, [batch, pos, heads·d_head]."""
        shaped = [part if part.dim() == 4 else part.unflatten(-1, (-1, self.d_head)) for part in parts]
        if self.by_head:
            return cat(shaped, dim=-1).flatten(-2)
        return cat([part.flatten(-2) for part in shaped], dim=-1)


# Attention modules with one projection for q, k and v, and whether it is laid out head by head.
_FUSED_BY_HEAD = {"GPT2Attention": False, "Phi3Attention": False, "GPTNeoXAttention": True}


def fused_layout(module: Any) -> FusedLayout:
    """The layout of a module's fused projection.

    Raises:
        RefusedModel: for a family whose layout is not known.
    """
    by_head = _FUSED_BY_HEAD.get(type(module).__name__)
    if by_head is None:
        known = ", ".join(_FUSED_BY_HEAD)
        raise RefusedModel(
            f"{type(module).__name__} computes q, k and v in one projection of unknown layout, so hook_q, hook_k and "
            f"hook_v cannot be served; known: {known}. hook_rot_q and hook_rot_k can be hooked instead"
        )
    config = module.config
    n_kv_heads = n_kv_heads_of(module, config)
    return FusedLayout(config.num_attention_heads, n_kv_heads, d_head_of(module, config), by_head)


def d_head_of(module: Any, config: Any) -> int:
    """The size of one head's query."""
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def n_kv_heads_of(module: Any, config: Any) -> int:
    """How many heads of keys and values an attention module has.

    By what the module computes with: a configuration may carry a `num_key_value_heads` that nothing reads (GPT-2,
    GPT-NeoX).
    """
    return int(config.num_attention_heads) // int(getattr(module, "num_key_value_groups", None) or 1)
