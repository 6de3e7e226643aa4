"""Fused kernels that also return their log-sum-exp; key blocks if a device has none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from phaselens.attention import _flex, _key_blocks
from phaselens.attention._problem import Problem

ROWS = 256
"""Queries per kernel call where the visible keys are not a plain causal square."""


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the softmax over real keys; the caller adds sink logits and `Problem.row_shift`.

    out [batch, head, query, d_v] in v's dtype or wider, lse [batch, head, query] in `compute_dtype`; a query
    that sees nothing has out 0 and lse −inf.
    """
    if _flex.serves(problem, v):
        result = _flex.attend(problem, v)
        if result is not None:
            return result
    if problem.softcap is not None or not _has_kernel(problem):
        return _key_blocks.attend(problem, v)
    is_plain = problem.mask is None and problem.bias is None
    sees_all_before = is_plain and (problem.window is None or problem.window >= problem.n_keys)
    if sees_all_before and problem.hidden_keys is None:
        if problem.n_queries == problem.n_keys:
            return _fused(problem.q, problem.k, v, problem.scale, causal=True)
        if problem.n_queries == 1:
            return _fused(problem.q, problem.k, v, problem.scale)
    if sees_all_before and _hides_first_key_only(problem):
        return _attend_after_first(problem, v)
    return _attend_by_rows(problem, v)


def _hides_first_key_only(problem: Problem) -> bool:
    """Return whether key 0 is the only hidden key in every text, and the queries are those of the keys."""
    keys = problem.hidden_keys
    return keys is not None and 1 < problem.n_queries == problem.n_keys and bool((keys == 0).all())


def _attend_after_first(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend without key 0, by one causal call on what remains; query 0 sees nothing."""
    out, lse = _fused(problem.q[:, :, 1:], problem.k[:, :, 1:], v[:, :, 1:], problem.scale, causal=True)
    return pad(out, (0, 0, 1, 0)), pad(lse, (1, 0), value=-torch.inf)


def _device_type(tensor: Tensor) -> str:
    """Return the kind of device that decides the kernel; tests of the choice replace it."""
    return tensor.device.type


def _has_kernel(problem: Problem) -> bool:
    device, dtype = problem.q.device, problem.q.dtype
    device_type = _device_type(problem.q)
    if problem.bias is not None and dtype in (torch.float16, torch.bfloat16):
        return False  # the kernel would round the bias
    if not problem.scale > 0:  # a kernel may scale after masking: 0 · −inf is NaN
        return False
    if device_type == "cpu":
        return True
    if device_type != "cuda" or dtype == torch.float64 or problem.q.shape[-1] > 256:
        return False
    return dtype != torch.bfloat16 or _flex.is_ampere(device)


def _attend_by_rows(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend in blocks of queries, each on the keys that it can see, with the mask of that block only."""
    batch, n_heads, n_queries, _ = problem.q.shape
    out = v.new_zeros((batch, n_heads, n_queries, v.shape[-1]))
    lse = v.new_full((batch, n_heads, n_queries), -torch.inf, dtype=problem.compute_dtype)
    for start, stop in _key_blocks.spans(0, n_queries, ROWS):
        first_key, key_end = problem.visible_keys(start, stop)
        if first_key == key_end:
            continue
        q, k = problem.q[:, :, start:stop], problem.k[:, :, first_key:key_end]
        hidden, bias = problem.mask_block((start, stop), (first_key, key_end))
        additive_mask = _additive_mask(hidden, bias, q.dtype)
        block_out, block_lse = _fused(
            q, k, v[:, :, first_key:key_end], problem.scale, additive_mask=additive_mask
        )
        if additive_mask is not None:
            sees_nothing = (additive_mask == -torch.inf).all(-1)
            block_out = block_out.masked_fill(sees_nothing[..., None], 0.0)
            block_lse = block_lse.masked_fill(sees_nothing, -torch.inf)
        out[:, :, start:stop] = block_out
        lse[:, :, start:stop] = block_lse
    return out, lse


def _additive_mask(hidden: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return an additive mask in the kernel's dtype, −inf where hidden; None if nothing is hidden or biased."""
    if hidden is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias.to(dtype).masked_fill(hidden, -torch.inf)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    additive_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the device's kernel; `causal` needs equal numbers of queries and keys.

    `additive_mask` is [batch | 1, head | 1, query, key]."""
    # The kernels read the numbers of a vector as neighbours in memory, whatever the strides say.
    q, k, v = (states if states.stride(-1) == 1 else states.contiguous() for states in (q, k, v))
    if _device_type(q) == "cpu":
        return _cpu(q, k, v, scale, causal, additive_mask)
    if additive_mask is None and q.dtype in (torch.float16, torch.bfloat16) and _flex.is_ampere(q.device):
        return _cuda_flash(q, k, v, scale, causal)
    return _cuda_efficient(q, k, v, scale, causal, additive_mask)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, additive_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_v, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _zero_padded(q, width),
        _zero_padded(k, width),
        _zero_padded(v, width),
        0.0,
        causal,
        attn_mask=additive_mask,
        scale=scale,
    )
    return out[..., :d_v], lse


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Call flash attention, which shares key heads natively; needs one head size, a multiple of 8, for q, k and v."""
    d_v = v.shape[-1]
    width = -(-max(q.shape[-1], d_v) // 8) * 8
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        _zero_padded(q, width),
        _zero_padded(k, width),
        _zero_padded(v, width),
        0.0,
        causal,
        False,
        scale=scale,
    )
    return out[..., :d_v], lse[..., : q.shape[2]]


def _cuda_efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, additive_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call efficient attention: repeats key heads, needs sizes in multiples of 8 and mask strides of 16, pads lse."""
    group, d_v = q.shape[1] // k.shape[1], v.shape[-1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if additive_mask is not None:
        n_keys = k.shape[2]
        additive_mask = _zero_padded(additive_mask, -(-n_keys // 16) * 16)[..., :n_keys].expand(
            *q.shape[:3], n_keys
        )
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _zero_padded(q, -(-q.shape[-1] // 8) * 8),
        _zero_padded(k, -(-k.shape[-1] // 8) * 8),
        _zero_padded(v, -(-d_v // 8) * 8),
        additive_mask,
        True,
        0.0,
        causal,
        scale=scale,
    )
    return out[..., :d_v], lse[..., : q.shape[2]]


def _zero_padded(tensor: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros up to `width`; they do not change dot products."""
    return pad(tensor, (0, width - tensor.shape[-1])) if width > tensor.shape[-1] else tensor
