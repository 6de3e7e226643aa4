"""The layout of queries, keys and values in the output of one projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat


@dataclass(frozen=True)
class FusedLayout:
    """Layout of queries, keys and values in the output of one projection.

    ``by_head`` False: all queries, then all keys, then all values (GPT-2, Phi-3). True: for each head its query, key
    and value (GPT-NeoX).
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    by_head: bool

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [batch, pos, all] into q [batch, pos, n_heads, d_head], k and v [batch, pos, n_kv_heads, d_head]."""
        if self.by_head:
            q, k, v = fused.unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)
            return q, k, v
        sizes = [self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head]
        q, k, v = (projected.unflatten(-1, (-1, self.d_head)) for projected in fused.split(sizes, dim=-1))
        return q, k, v

    def join(self, projections: tuple[Tensor, Tensor, Tensor] | list[Tensor]) -> Tensor:
        """Join what `split` returned; each projection may also be flat, [batch, pos, heads·d_head]."""
        shaped = [
            projection if projection.dim() == 4 else projection.unflatten(-1, (-1, self.d_head))
            for projection in projections
        ]
        if self.by_head:
            return cat(shaped, dim=-1).flatten(-2)
        return cat([projection.flatten(-2) for projection in shaped], dim=-1)
