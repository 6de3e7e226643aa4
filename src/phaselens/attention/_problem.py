"""The attention a caller describes: shapes checked once, and who sees whom, asked block by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Queries and keys with everything that shapes their softmax.

    q [batch, head, query, d_head], k [batch, kv_head, key, d_head]; `mask`, `window`, `softcap` and
    `sinks` as in `phaselens.attention`. Nothing of size query × key is ever kept here.
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        q, k = self.q, self.k
        if q.ndim != 4 or k.ndim != 4:
            raise ValueError(
                "expected q [batch, head, query, d_head] and k [batch, kv_head, key, d_head], "
                f"received q {_shape(q)} and k {_shape(k)}"
            )
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ValueError(
                "expected k [batch, kv_head, key, d_head] with q's batch and d_head, its heads dividing q's, "
                f"received q {_shape(q)} and k {_shape(k)}"
            )
        if q.dtype not in FLOATS or q.dtype != k.dtype or q.device != k.device:
            raise ValueError(
                "expected q and k of one floating dtype on one device, "
                f"received {q.dtype} on {q.device} and {k.dtype} on {k.device}"
            )
        if self.n_queries > self.n_keys and self.mask is None:
            raise ValueError(
                f"expected at least as many keys as queries (the last ones are aligned), received "
                f"{self.n_queries} queries and {self.n_keys} keys; pass a mask that says who sees whom"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"expected a window of at least 1 key (the query's own), received {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected a softcap above 0, received {self.softcap}")
        if self.sinks is not None and self.sinks.shape != (self.n_heads,):
            raise ValueError(f"expected sinks [head] = ({self.n_heads},), received {_shape(self.sinks)}")
        if self.mask is not None:
            self._check_mask(self.mask)

    def _check_mask(self, mask: Tensor) -> None:
        full = (self.q.shape[0], self.n_heads, self.n_queries, self.n_keys)
        fits = mask.ndim == 4 and mask.shape[2:] == full[2:]
        if not (fits and mask.shape[0] in (1, full[0]) and mask.shape[1] in (1, full[1])):
            raise ValueError(
                f"expected a mask [batch | 1, head | 1, query, key] for {full}, received {_shape(mask)}"
            )
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(
                f"expected a bool mask (True = visible) or an additive one, received {mask.dtype}"
            )

    @property
    def n_heads(self) -> int:
        return self.q.shape[1]

    @property
    def n_queries(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query among the keys: the last query stands at the last key."""
        return self.n_keys - self.n_queries

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype in which scores are formed and summed: float32, float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @cached_property
    def has_bias(self) -> bool:
        """Whether the mask adds anything but 0 to a score that stays visible."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        rows = range(0, self.n_queries, 256)
        return any(
            bool((~_hides(part) & (part != 0)).any()) for part in (self.mask[:, :, r : r + 256] for r in rows)
        )

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys that queries start…stop−1 can see at all."""
        if self.mask is not None and self.window is None:
            return 0, self.n_keys
        first = 0 if self.window is None else max(0, start + self.offset - self.window + 1)
        return first, max(first, min(self.n_keys, stop + self.offset))

    def block(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """(hidden, bias) of a block, each broadcastable to [batch, head, row, col] or None.

        hidden is True where a query cannot see a key. Of an additive mask, −inf and what is as low as
        half its dtype's most negative number hide; the rest is added to the score.
        """
        hidden: Tensor | None = None
        bias: Tensor | None = None
        if self.mask is not None:
            part = self.mask[:, :, rows[0] : rows[1], cols[0] : cols[1]]
            if part.dtype == torch.bool:
                hidden = ~part
            else:
                hidden = _hides(part)
                bias = part.to(self.accumulate).masked_fill(hidden, 0.0) if self.has_bias else None
        if self.mask is None or self.window is not None:
            band = self._band(rows, cols)
            if band is not None:
                hidden = band if hidden is None else hidden | band
        return hidden, bias

    def _band(self, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor | None:
        first, last = rows[0] + self.offset, rows[1] - 1 + self.offset
        all_past = cols[1] - 1 <= first
        all_near = self.window is None or cols[0] > last - self.window
        if all_past and all_near:
            return None
        query = torch.arange(first, last + 1, device=self.q.device)[:, None]
        key = torch.arange(cols[0], cols[1], device=self.q.device)[None, :]
        far = key > query
        if self.window is not None:
            far = far | (key <= query - self.window)
        return far[None, None]


def no_gradient(name: str, *tensors: Tensor | None) -> None:
    """Refuse to run where autograd would record nothing and so give a gradient that is silently wrong."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{name} streams through kernels whose log-sum-exp has no gradient; call it under "
            "torch.no_grad(), or use phaselens.attention.explicit, which is differentiable"
        )


def _hides(mask: Tensor) -> Tensor:
    return mask <= torch.finfo(mask.dtype).min / 2


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
