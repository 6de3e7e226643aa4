"""The attention a caller describes: shapes checked once, and who sees whom, asked block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Required, TypedDict

import torch
from torch import Tensor

from phaselens.errors import InputError, require_number, require_tensor, require_whole


class SoftmaxOptions(TypedDict, total=False):
    """What shapes the softmax, the same in every function.

    scale: factor of the dot products, usually d_head ** -0.5.
    mask: [batch | 1, head | 1, query, key], bool (True = visible) or added to the scores, where −inf and a
        dtype's most negative number hide; says alone who sees whom. None: causal, the last query standing
        at the last key.
    window: a query sees itself and the window − 1 keys before it, none after.
    softcap: c turns a score s into c·tanh(s / c).
    sinks: [head], learned logits: one more column of the softmax, without a value.
    """

    scale: Required[float]
    mask: Tensor | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


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
        if not isinstance(q, Tensor) or not isinstance(k, Tensor):
            raise InputError(
                f"expected q and k as tensors, received {type(q).__name__} and {type(k).__name__}"
            )
        require_number("scale", self.scale)
        if self.window is not None:
            require_window(self.window)
        if self.softcap is not None:
            require_number("softcap", self.softcap)
        for name, tensor in (("mask", self.mask), ("sinks", self.sinks)):
            if tensor is not None:
                require_tensor(name, tensor)
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
        if not q.numel() or not k.numel():
            raise ValueError(
                f"expected at least one query and one key, received q {_shape(q)} and k {_shape(k)}"
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

    @cached_property
    def accumulate(self) -> torch.dtype:
        """The dtype in which scores are formed and summed: float32, or float64.

        float64 for float64 inputs, and where torch has been told to round float32 products to TF32 or bf16.
        """
        backend = torch.backends.cuda if self.q.device.type == "cuda" else torch.backends.mkldnn
        exact = backend.matmul.fp32_precision in ("none", "ieee")
        return torch.float32 if exact and self.q.dtype != torch.float64 else torch.float64

    @cached_property
    def has_bias(self) -> bool:
        """Whether the mask adds anything but 0 to a score that stays visible."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        rows = range(0, self.n_queries, 256)
        return any(
            bool((~_hides(part) & (part != 0)).any()) for part in (self.mask[:, :, r : r + 256] for r in rows)
        )

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """Of a given mask: the (first, last + 1) visible key of each query in any batch row and head."""
        assert self.mask is not None
        extents: list[tuple[int, int]] = []
        for start in range(0, self.n_queries, 256):
            part = self.mask[:, :, start : start + 256]
            seen = (part if part.dtype == torch.bool else ~_hides(part)).any(0).any(0)
            first = seen.int().argmax(-1)
            last = self.n_keys - seen.flip(-1).int().argmax(-1)
            blind = ~seen.any(-1)
            pairs = zip(first.tolist(), last.masked_fill(blind, 0).tolist(), strict=True)
            extents.extend(pairs)
        return extents

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys (first, last + 1) that queries start … stop−1 can see at all; (0, 0) if there are none."""
        first, last = 0, self.n_keys
        if self.mask is not None:
            seen = [extent for extent in self.extents[start:stop] if extent[1]]
            first, last = min((e[0] for e in seen), default=0), max((e[1] for e in seen), default=0)
        if self.mask is None or self.window is not None:
            last = min(last, stop + self.offset)
        if self.window is not None:
            first = max(first, start + self.offset - self.window + 1)
        return (first, last) if first < last else (0, 0)

    def n_seen(self, start: int, stop: int) -> int:
        """How many keys lie in `key_range`."""
        first, last = self.key_range(start, stop)
        return last - first

    def edges(self, rows: tuple[int, int], cols: tuple[int, int]) -> list[tuple[int, int]]:
        """The spans of columns of a block in which anything can be hidden or biased."""
        if self.mask is not None:
            return [cols]
        left = cols[0] if self.window is None else rows[1] + self.offset - self.window
        right = rows[0] + self.offset + 1
        if left > right:
            return [cols]
        spans = [(cols[0], min(left, cols[1])), (max(right, cols[0]), cols[1])]
        return [span for span in spans if span[0] < span[1]]

    def part(self, batch: slice, kv_heads: slice) -> Problem:
        """The same for some batch rows and key heads, with the query heads that share them."""
        heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
        mask = self.mask
        if mask is not None:
            mask = mask[
                batch if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)
            ]
        sinks = None if self.sinks is None else self.sinks[heads]
        part = replace(self, q=self.q[batch, heads], k=self.k[batch, kv_heads], mask=mask, sinks=sinks)
        return part._knowing(self)

    def head(self, batch: int, head: int) -> Problem:
        """One query head of one batch row, in float64; a query or key that is not finite is all NaN."""
        kv_head = head // self.group
        part = self.part(slice(batch, batch + 1), slice(kv_head, kv_head + 1))
        inner = head - kv_head * self.group
        mask = part.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, inner : inner + 1]
        sinks = None if part.sinks is None else part.sinks[inner : inner + 1]
        q, k = _spoil(part.q[:, inner : inner + 1].double()), _spoil(part.k.double())
        return replace(part, q=q, k=k, mask=mask, sinks=sinks)._knowing(self)

    def _knowing(self, whole: Problem) -> Problem:
        """Itself, with what was read off the whole mask: it holds for a part as well, and reading is slow."""
        for name in ("extents", "has_bias"):
            if name in whole.__dict__:
                self.__dict__[name] = whole.__dict__[name]
        return self

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


def require_window(window: object) -> None:
    if isinstance(window, int) and not isinstance(window, bool) and window < 1:
        raise InputError(f"expected a window of at least 1 key (the query's own), received {window}")
    require_whole("window", window, 1)


def no_gradient(name: str, *tensors: Tensor | None) -> None:
    """Refuse to run where autograd would record nothing and so give a gradient that is silently wrong."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{name} streams through kernels whose log-sum-exp has no gradient; call it under "
            "torch.no_grad(), or use phaselens.attention.explicit, which is differentiable"
        )


def _spoil(x: Tensor) -> Tensor:
    """NaN throughout each vector that is not finite: an infinite key may score −inf, and so look unseen."""
    return x.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)


def _hides(mask: Tensor) -> Tensor:
    return mask <= torch.finfo(mask.dtype).min / 2


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
