"""Attention with its log-sum-exp, without the matrix."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention import _kernels
from phaselens.attention._arguments import require_no_gradient
from phaselens.attention._problem import Problem, SoftmaxOptions
from phaselens.errors import require_tensor


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[SoftmaxOptions]) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and the log-sum-exp of its rows, (out, lse), in O(query) memory.

    q [batch, head, query, d_head], k [batch, kv_head, key, d_head], v [batch, kv_head, key, d_v], where
    the number of heads is a multiple of kv_heads. out [batch, head, query, d_v] in q's dtype; lse [batch,
    head, query] in nats, float32 (float64 for float64 inputs). Options: `SoftmaxOptions`. A query that sees
    nothing gets out 0 and lse −inf (the sink logit if there is one).

    Uses the fused kernel where the device has one, and so the model's own rounding: `out` is what the model computes.

    Raises ValueError where shapes do not fit, RuntimeError where a gradient would be needed.

    >>> import torch
    >>> x = torch.zeros(1, 2, 4, 8)
    >>> out, lse = attend(x, x, x, scale=8 ** -0.5)
    >>> [round(value, 4) for value in lse[0, 0].exp().tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    sink_logits = options.get("sink_logits")
    require_no_gradient("attend", q, k, v, sink_logits, options.get("bias"))
    problem = Problem(q, k, **options)
    check_values(k, v)
    out, lse = _kernels.attend(problem, v)
    lse = problem.absolute(lse)
    if sink_logits is not None:
        column = sink_logits.to(lse.dtype)[None, :, None]
        real_lse, lse = lse, torch.logaddexp(lse, column)
        out = out * (real_lse - lse).exp()[..., None]
    return out.to(q.dtype), lse


def check_values(k: Tensor, v: Tensor) -> None:
    require_tensor("v", v)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        front = ", ".join(str(size) for size in k.shape[:3])
        raise ValueError(
            f"expected v [batch, kv_head, key, d_v] = ({front}, d_v) of {k.dtype}, "
            f"received {tuple(v.shape)} of {v.dtype}"
        )
