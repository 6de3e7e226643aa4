"""The fused kernels that also return their log-sum-exp; strips where a device has none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from phaselens.attention import _strips
from phaselens.attention._problem import Problem

ROWS = 256
"""Queries in one call of a kernel where the visible keys differ from a plain causal square."""


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the softmax over real keys; learned sinks are left to the caller.

    out [batch, head, query, d_v] in v's dtype or wider, lse [batch, head, query] in the accumulating
    dtype; a query that sees nothing has out 0 and lse −inf.
    """
    if problem.softcap is not None or not _has_kernel(problem):
        return _strips.attend(problem, v)
    if problem.mask is None and (problem.window is None or problem.window >= problem.n_keys):
        if problem.n_queries == problem.n_keys:
            return _fused(problem.q, problem.k, v, problem.scale, causal=True)
        if problem.n_queries == 1:
            return _fused(problem.q, problem.k, v, problem.scale)
    return _by_rows(problem, v)


def _has_kernel(problem: Problem) -> bool:
    device, dtype = problem.q.device, problem.q.dtype
    if not problem.scale > 0:  # a kernel may scale after it has hidden: 0 · −inf is NaN
        return False
    if device.type == "cpu":
        return True
    if device.type != "cuda" or dtype == torch.float64 or problem.q.shape[-1] > 256:
        return False
    return dtype != torch.bfloat16 or _is_ampere(device)


def _is_ampere(device: torch.device) -> bool:
    """Whether the GPU is new enough for the flash kernel and for bfloat16."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def _by_rows(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of queries, each on the slice of keys that it can see, with a mask of that block only."""
    batch, n_heads, n_queries, _ = problem.q.shape
    out = v.new_zeros((batch, n_heads, n_queries, v.shape[-1]))
    lse = v.new_full((batch, n_heads, n_queries), -torch.inf, dtype=problem.accumulate)
    for start, stop in _strips.spans(0, n_queries, ROWS):
        first, last = problem.key_range(start, stop)
        if first == last:
            continue
        q, k = problem.q[:, :, start:stop], problem.k[:, :, first:last]
        hidden, bias = problem.block((start, stop), (first, last))
        added = _additive(hidden, bias, q.dtype)
        part, norm = _fused(q, k, v[:, :, first:last], problem.scale, added=added)
        if added is not None:
            blind = (added == -torch.inf).all(-1)
            part = part.masked_fill(blind[..., None], 0.0)
            norm = norm.masked_fill(blind, -torch.inf)
        out[:, :, start:stop] = part
        lse[:, :, start:stop] = norm
    return out, lse


def _additive(hidden: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One additive mask of the kernel's dtype, −inf where hidden."""
    if hidden is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias.to(dtype).masked_fill(hidden, -torch.inf)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One kernel call; `causal` is for as many queries as keys, `added` [batch | 1, head | 1, query, key]."""
    if q.device.type == "cpu":
        return _cpu(q, k, v, scale, causal, added)
    if added is None and q.dtype in (torch.float16, torch.bfloat16) and _is_ampere(q.device):
        return _cuda_flash(q, k, v, scale, causal)
    return _cuda_efficient(q, k, v, scale, causal, added)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_v, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _wide(q, width), _wide(k, width), _wide(v, width), 0.0, causal, attn_mask=added, scale=scale
    )
    return out[..., :d_v], lse


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Key heads are shared natively; the head size must be one multiple of 8 for q, k and v."""
    d_v = v.shape[-1]
    width = -(-max(q.shape[-1], d_v) // 8) * 8
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        _wide(q, width), _wide(k, width), _wide(v, width), 0.0, causal, False, scale=scale
    )
    return out[..., :d_v], lse[..., : q.shape[2]]


def _cuda_efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """No shared key heads, sizes in multiples of 8, mask rows on steps of 16 elements; lse comes padded."""
    group, d_v = q.shape[1] // k.shape[1], v.shape[-1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if added is not None:
        n_keys = k.shape[2]
        added = _wide(added, -(-n_keys // 16) * 16)[..., :n_keys].expand(*q.shape[:3], n_keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _wide(q, -(-q.shape[-1] // 8) * 8),
        _wide(k, -(-k.shape[-1] // 8) * 8),
        _wide(v, -(-d_v // 8) * 8),
        added,
        True,
        0.0,
        causal,
        scale=scale,
    )
    return out[..., :d_v], lse[..., : q.shape[2]]


def _wide(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension up to `width`: they change no product."""
    return pad(tensor, (0, width - tensor.shape[-1])) if width > tensor.shape[-1] else tensor
