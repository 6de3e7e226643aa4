"""Attention close to the diagonal: what queries give to the keys 0, 1, 2, … positions before them."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.attention import attend

ROWS = 64
"""Queries in a block."""
EXACT_UP_TO = 256.0
"""Up to here a log-sum-exp in float32 gives weights to a relative 2e-5; larger ones are computed anew in float64."""


def distance_profile(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    n: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention mass [batch, head, n] at distances 0 … n − 1, summed over queries: Σ_i p(i, i − distance).

    q [batch, head, pos, d_head], k [batch, kv_head, pos, d_head] after rotation, lse [batch, head, pos] of causal
    attention with that `scale`, `window` and `softcap`; `lengths` [batch] are the real tokens of right-padded texts,
    whose pads are not counted. O(pos · n) time and memory. Divide by max(0, length − distance) for a mean.

    >>> x = torch.zeros(1, 1, 4, 8)
    >>> lse = torch.arange(1.0, 5.0).log()[None, None]
    >>> [round(value, 4) for value in distance_profile(x, x, lse, 3, scale=1.0)[0, 0].tolist()]
    [2.0833, 1.0833, 0.5833]
    """
    if n < 1:
        raise ValueError(f"expected at least 1 distance, received {n}")
    if lse.numel() and bool(lse.abs().amax() > EXACT_UP_TO) and q.dtype != torch.float64:
        q, k = q.double(), k.double()
        _, precise = attend(q, k, k, scale=scale, window=window, softcap=softcap)
        # They differ by more than rounding only where a learned sink stands in the sum; then the given one is right.
        lse = torch.where((precise - lse).abs() <= 1e-6 * precise.abs(), precise, lse)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, n_heads, n_pos, _ = q.shape
    sums = q.new_zeros((batch, n_heads, n), dtype=torch.float64)
    for row in range(batch):
        length = n_pos if lengths is None else int(lengths[row])
        if length:
            sums[row] = _one(
                q[row, :, :length].to(dtype),
                k[row, :, :length].to(dtype),
                lse[row, :, :length].to(dtype),
                min(n, length),
                n,
                scale,
                softcap,
            )
    if window is not None and window < n:
        sums[..., window:] = 0.0
    return sums


def _one(
    q: Tensor, k: Tensor, lse: Tensor, width: int, n: int, scale: float, softcap: float | None
) -> Tensor:
    """One text: q [head, pos, d_head], k [kv_head, pos, d_head], lse [head, pos] → [head, n]."""
    n_heads, n_pos, d_head = q.shape
    n_kv = len(k)
    n_blocks = -(-n_pos // ROWS)
    pad = torch.nn.functional.pad
    past = n_blocks * ROWS - n_pos
    blocks = pad(q, (0, 0, 0, past)).view(n_kv, n_heads // n_kv, n_blocks, ROWS, d_head).transpose(1, 2)
    # The keys of a block of queries: its own, and width − 1 before them.
    span = ROWS + width - 1
    keys = pad(k, (0, 0, width - 1, past)).unfold(1, span, ROWS).transpose(-1, -2).contiguous()
    scores = blocks.reshape(n_kv, n_blocks, -1, d_head) @ keys.transpose(
        -1, -2
    )  # keys [kv_head, block, span, d_head]
    scores = scores.view(n_kv, n_blocks, -1, ROWS, span)
    # Entry (row, c) of the band is the key at distance width − 1 − c: one step right for each row down.
    *outer, _, _ = scores.stride()
    shape = (*scores.shape[:3], ROWS, width)
    band = scores.as_strided(shape, (*outer, span + 1, 1)).mul(scale)
    if softcap is not None:
        band = band.div_(softcap).tanh_().mul_(softcap)
    norm = pad(lse, (0, past)).view(n_kv, -1, n_blocks, ROWS).transpose(1, 2)
    p = band.sub_(norm[..., None]).exp_()
    # Keys before the first one, in the first blocks, and queries behind the last one, in the last.
    row = torch.arange(ROWS, device=q.device)[:, None]
    distance = torch.arange(width - 1, -1, -1, device=q.device)
    for block in range(min(n_blocks, -(-(width - 1) // ROWS))):
        p[:, block].masked_fill_(row + block * ROWS < distance, 0.0)
    if past:
        p[:, -1, :, ROWS - past :] = 0.0
    sums = p.sum(-2).sum(1, dtype=torch.float64)
    found = sums.new_zeros((n_heads, n))
    found[:, :width] = sums.reshape(n_heads, width).flip(-1)
    return found
