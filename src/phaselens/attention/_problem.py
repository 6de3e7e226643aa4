"""A checked description of an attention, and its mask block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Required, TypedDict

import torch
from torch import Tensor

from phaselens.attention._arguments import require_key_indices, require_window, shape_of
from phaselens.attention._float32_products import products_are_exact
from phaselens.errors import InputError, require_number, require_tensor


class SoftmaxOptions(TypedDict, total=False):
    """Options of the softmax, the same in every function.

    scale: factor of the dot products, usually d_head ** -0.5.
    mask: [batch | 1, head | 1, query, key], bool (True = visible) or added to the scores, where −inf and a
        dtype's most negative number hide; replaces the causal mask. None: causal, with the last query at the
        position of the last key.
    window: a query sees itself and the window − 1 keys before it, none after.
    softcap: c turns a score s into c·tanh(s / c).
    sink_logits: [head], learned logits of one more column of the softmax, which has no value.
    hidden_keys: [batch | 1, n], indices of keys that no query sees, by text; −1 stands for no key.
    bias: [batch | 1, head | 1, query | 1, key], added to the scores after the softcap; unlike a mask, it hides nothing
        and does not replace the causal mask. One row for all queries (ALiBi) needs O(key) memory.
    """

    scale: Required[float]
    mask: Tensor | None
    window: int | None
    softcap: float | None
    sink_logits: Tensor | None
    hidden_keys: Tensor | None
    bias: Tensor | None


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Queries and keys with all options of their softmax.

    q [batch, head, query, d_head], k [batch, kv_head, key, d_head]; the other fields as in `SoftmaxOptions`.
    `first_text` is the batch row in the whole problem at which this subset of it begins. Nothing of size query × key is
    ever stored here.

    With a bias, scores in blocks are relative: `row_shift`, the bias at a query's own key, is subtracted. The biases of
    ALiBi grow with the position, and float32 would lose the differences between them.
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    hidden_keys: Tensor | None = None
    bias: Tensor | None = None
    first_text: int = 0

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
        for name, tensor in (("mask", self.mask), ("sink_logits", self.sink_logits), ("bias", self.bias)):
            if tensor is not None:
                require_tensor(name, tensor)
        if q.ndim != 4 or k.ndim != 4:
            raise ValueError(
                "expected q [batch, head, query, d_head] and k [batch, kv_head, key, d_head], "
                f"received q {shape_of(q)} and k {shape_of(k)}"
            )
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ValueError(
                "expected k [batch, kv_head, key, d_head] with q's batch and d_head, its heads dividing q's, "
                f"received q {shape_of(q)} and k {shape_of(k)}"
            )
        if not q.numel() or not k.numel():
            raise ValueError(
                f"expected at least one query and one key, received q {shape_of(q)} and k {shape_of(k)}"
            )
        if q.dtype not in FLOAT_DTYPES or q.dtype != k.dtype or q.device != k.device:
            raise ValueError(
                "expected q and k of one floating dtype on one device, "
                f"received {q.dtype} on {q.device} and {k.dtype} on {k.device}"
            )
        if self.n_queries > self.n_keys and self.mask is None:
            raise ValueError(
                f"expected at least as many keys as queries (the last ones are aligned), received "
                f"{self.n_queries} queries and {self.n_keys} keys; pass a mask that says which query sees which key"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected a softcap above 0, received {self.softcap}")
        if self.sink_logits is not None and self.sink_logits.shape != (self.n_heads,):
            raise ValueError(
                f"expected sink_logits [head] = ({self.n_heads},), received {shape_of(self.sink_logits)}"
            )
        if self.mask is not None:
            self._check_mask(self.mask)
        if self.hidden_keys is not None:
            require_key_indices("hidden_keys", self.hidden_keys, q.shape[0])
        if self.bias is not None:
            self._check_bias(self.bias)

    def _check_mask(self, mask: Tensor) -> None:
        expected = (self.q.shape[0], self.n_heads, self.n_queries, self.n_keys)
        fits = mask.ndim == 4 and mask.shape[2:] == expected[2:]
        if not (fits and mask.shape[0] in (1, expected[0]) and mask.shape[1] in (1, expected[1])):
            raise ValueError(
                f"expected a mask [batch | 1, head | 1, query, key] for {expected}, received {shape_of(mask)}"
            )
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(
                f"expected a bool mask (True = visible) or an additive one, received {mask.dtype}"
            )

    def _check_bias(self, bias: Tensor) -> None:
        sizes = (self.q.shape[0], self.n_heads, self.n_queries)
        fits = bias.ndim == 4 and bias.shape[3] == self.n_keys
        if not fits or any(size not in (1, full) for size, full in zip(bias.shape, sizes, strict=False)):
            raise ValueError(
                f"expected a bias [batch | 1, head | 1, query | 1, key] for {(*sizes, self.n_keys)}, received "
                f"{shape_of(bias)}"
            )
        if not bias.dtype.is_floating_point or not bool(bias.isfinite().all()):
            raise ValueError(f"expected a bias of finite numbers, received {bias.dtype}; hide keys by a mask")

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
        """Number of query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query among the keys; the last query is at the last key."""
        return self.n_keys - self.n_queries

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which scores are computed and summed: float32, or float64.

        float64 for float64 inputs, and where torch is set to round float32 products to TF32 or bf16.
        """
        is_exact = products_are_exact(self.q.device) and self.q.dtype != torch.float64
        return torch.float32 if is_exact else torch.float64

    @cached_property
    def has_bias(self) -> bool:
        """Whether the mask or the bias adds anything other than 0 to a visible score."""
        if self.bias is not None:
            return True
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        rows = range(0, self.n_queries, 256)
        return any(
            bool((~_hides(chunk) & (chunk != 0)).any())
            for chunk in (self.mask[:, :, row : row + 256] for row in rows)
        )

    @cached_property
    def row_shift(self) -> Tensor | None:
        """The bias at each query's own key, [batch | 1, head | 1, query], in `compute_dtype`; None without a bias."""
        if self.bias is None:
            return None
        own_key = torch.arange(self.n_queries, device=self.bias.device) + self.offset
        own_key = own_key.clamp(min=0)  # queries before the first key, which see nothing without a mask
        if self.bias.shape[2] == 1:
            shift = self.bias[:, :, 0].index_select(-1, own_key)
        else:
            shift = self.bias.gather(-1, own_key.expand(*self.bias.shape[:2], -1)[..., None])[..., 0]
        return shift.to(self.compute_dtype)

    def relative(self, lse: Tensor) -> Tensor:
        """Return log-sum-exps [batch, head, query] relative to `row_shift`."""
        return lse if self.row_shift is None else lse - self.row_shift

    def absolute(self, lse: Tensor) -> Tensor:
        """Return the inverse of `relative`."""
        return lse if self.row_shift is None else lse + self.row_shift

    @cached_property
    def visible_extents(self) -> list[tuple[int, int]]:
        """Range of keys (first, end) that the mask leaves visible to each query in any batch row and head."""
        assert self.mask is not None
        extents: list[tuple[int, int]] = []
        for start in range(0, self.n_queries, 256):
            chunk = self.mask[:, :, start : start + 256]
            visible = (chunk if chunk.dtype == torch.bool else ~_hides(chunk)).any(0).any(0)
            first_key = visible.int().argmax(-1)
            key_end = self.n_keys - visible.flip(-1).int().argmax(-1)
            sees_nothing = ~visible.any(-1)
            pairs = zip(first_key.tolist(), key_end.masked_fill(sees_nothing, 0).tolist(), strict=True)
            extents.extend(pairs)
        return extents

    def visible_keys(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys (first, end) that any of the queries start … stop−1 can see; (0, 0) if none."""
        first_key, key_end = 0, self.n_keys
        if self.mask is not None:
            extents = [extent for extent in self.visible_extents[start:stop] if extent[1]]
            first_key = min((extent[0] for extent in extents), default=0)
            key_end = max((extent[1] for extent in extents), default=0)
        if self.mask is None or self.window is not None:
            key_end = min(key_end, stop + self.offset)
        if self.window is not None:
            first_key = max(first_key, start + self.offset - self.window + 1)
        return (first_key, key_end) if first_key < key_end else (0, 0)

    def n_visible(self, start: int, stop: int) -> int:
        """Return the number of keys in `visible_keys`."""
        first_key, key_end = self.visible_keys(start, stop)
        return key_end - first_key

    def edges(self, rows: tuple[int, int], cols: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the spans of a block's columns in which scores can be hidden or biased."""
        if self.mask is not None or self.bias is not None or self.hidden_keys is not None:
            return [cols]
        left_edge = cols[0] if self.window is None else rows[1] + self.offset - self.window
        right_edge = rows[0] + self.offset + 1
        if left_edge > right_edge:
            return [cols]
        spans = [(cols[0], min(left_edge, cols[1])), (max(right_edge, cols[0]), cols[1])]
        return [span for span in spans if span[0] < span[1]]

    def subset(self, batch: slice, kv_heads: slice) -> Problem:
        """Return the problem for some batch rows and key heads, with the query heads that share them."""
        heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
        mask, bias = (_part(tensor, batch, heads) for tensor in (self.mask, self.bias))
        sink_logits = None if self.sink_logits is None else self.sink_logits[heads]
        hidden_keys = self.hidden_keys
        if hidden_keys is not None and hidden_keys.shape[0] > 1:
            hidden_keys = hidden_keys[batch]
        subset = replace(
            self,
            first_text=self.first_text + batch.start,
            q=self.q[batch, heads],
            k=self.k[batch, kv_heads],
            mask=mask,
            sink_logits=sink_logits,
            hidden_keys=hidden_keys,
            bias=bias,
        )
        return subset._with_cached_facts(self)

    def head(self, batch: int, head: int) -> Problem:
        """Return one query head of one batch row as a problem in float64; a vector that is not finite becomes NaN."""
        kv_head = head // self.group
        subset = self.subset(slice(batch, batch + 1), slice(kv_head, kv_head + 1))
        inner = head - kv_head * self.group
        mask, bias = (
            _part(tensor, slice(None), slice(inner, inner + 1)) for tensor in (subset.mask, subset.bias)
        )
        bias = None if bias is None else bias.double()
        sink_logits = None if subset.sink_logits is None else subset.sink_logits[inner : inner + 1]
        q, k = (
            _nan_unless_finite(subset.q[:, inner : inner + 1].double()),
            _nan_unless_finite(subset.k.double()),
        )
        return replace(subset, q=q, k=k, mask=mask, sink_logits=sink_logits, bias=bias)._with_cached_facts(
            self
        )

    def _with_cached_facts(self, source: Problem) -> Problem:
        """Copy the cached facts about the mask of `source`, of which this is a subset; they are slow to compute."""
        for name in ("visible_extents", "has_bias"):
            if name in source.__dict__:
                self.__dict__[name] = source.__dict__[name]
        return self

    def mask_block(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return (hidden, bias) of a block, each broadcastable to [batch, head, row, col] or None.

        hidden is True where a query cannot see a key. In an additive mask, −inf and values down to half its
        dtype's most negative number hide a key; other values are added to the score, as is `bias` less `row_shift`.
        """
        hidden: Tensor | None = None
        bias: Tensor | None = None
        if self.mask is not None:
            mask = self.mask[:, :, rows[0] : rows[1], cols[0] : cols[1]]
            if mask.dtype == torch.bool:
                hidden = ~mask
            else:
                hidden = _hides(mask)
                bias = mask.to(self.compute_dtype).masked_fill(hidden, 0.0) if self.has_bias else None
        if self.bias is not None and self.row_shift is not None:
            bias_rows = slice(*rows) if self.bias.shape[2] > 1 else slice(None)
            added = self.bias[:, :, bias_rows, cols[0] : cols[1]].to(self.compute_dtype)
            added = added - self.row_shift[:, :, rows[0] : rows[1], None]
            bias = added if bias is None else bias + added
        if self.mask is None or self.window is not None:
            band = self._hidden_band(rows, cols)
            if band is not None:
                hidden = band if hidden is None else hidden | band
        if self.hidden_keys is not None:
            keys = torch.arange(cols[0], cols[1], device=self.q.device)
            named = (self.hidden_keys.to(keys.device)[:, :, None] == keys).any(1)[:, None, None, :]
            if bool(named.any()):
                hidden = named if hidden is None else hidden | named
        return hidden, bias

    def mask_of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (hidden, bias) of the keys [batch, n], each broadcastable to [batch, head, query, n].

        Indices that are not those of a key are hidden; bias is None if nothing is added to a score.
        """
        is_key = (keys >= 0) & (keys < self.n_keys)
        hidden = ~is_key[:, None, None, :]
        bias: Tensor | None = None
        if self.hidden_keys is not None:
            named = keys[:, :, None] == self.hidden_keys.to(keys.device)[:, None, :]
            hidden = hidden | named.any(-1)[:, None, None, :]
        if self.mask is not None:
            mask = self.mask.expand(len(keys), -1, -1, -1)
            index = torch.where(is_key, keys, 0)[:, None, None, :].expand(*mask.shape[:3], -1)
            columns = mask.gather(3, index)
            if mask.dtype == torch.bool:
                hidden = hidden | ~columns
            else:
                hidden = hidden | _hides(columns)
                bias = columns.to(self.compute_dtype).masked_fill(hidden, 0.0) if self.has_bias else None
        if self.bias is not None:
            own = self.bias.expand(len(keys), -1, -1, -1)
            index = torch.where(is_key, keys, 0)[:, None, None, :].expand(*own.shape[:3], -1)
            added = own.gather(3, index).double()
            bias = added if bias is None else bias + added
        if self.mask is None or self.window is not None:
            query = torch.arange(self.n_queries, device=keys.device)[:, None] + self.offset
            key = keys[:, None, None, :]
            hidden = hidden | (key > query)
            if self.window is not None:
                hidden = hidden | (key <= query - self.window)
        return hidden, bias

    def _hidden_band(self, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor | None:
        first_query, last_query = rows[0] + self.offset, rows[1] - 1 + self.offset
        all_past = cols[1] - 1 <= first_query
        all_near = self.window is None or cols[0] > last_query - self.window
        if all_past and all_near:
            return None
        query = torch.arange(first_query, last_query + 1, device=self.q.device)[:, None]
        key = torch.arange(cols[0], cols[1], device=self.q.device)[None, :]
        hidden = key > query
        if self.window is not None:
            hidden = hidden | (key <= query - self.window)
        return hidden[None, None]


def _part(tensor: Tensor | None, batch: slice, heads: slice) -> Tensor | None:
    """Return some batch rows and heads of a tensor [batch | 1, head | 1, …], keeping what all of them share."""
    if tensor is None:
        return None
    return tensor[
        batch if tensor.shape[0] > 1 else slice(None), heads if tensor.shape[1] > 1 else slice(None)
    ]


def _nan_unless_finite(x: Tensor) -> Tensor:
    """Set all of a vector that is not finite to NaN: an infinite key could score −inf and look hidden."""
    return x.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)


def _hides(mask: Tensor) -> Tensor:
    return mask <= torch.finfo(mask.dtype).min / 2
