"""Next-token loss of a frozen unembedding, in chunks, so that the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The number of positions whose logits are computed at a time: they should stay in the processor's cache.
CHUNK = 128


class _FrozenHeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ head.T` against `targets`, with its gradient computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = hidden.detach().to(head.dtype)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        exact = torch.promote_types(head.dtype, torch.float32)
        for start in range(0, len(rows), CHUNK):
            chunk, target = rows[start : start + CHUNK], targets[start : start + CHUNK, None]
            log_p = torch.log_softmax(chunk @ head.T, dim=-1, dtype=exact)
            total -= log_p.gather(1, target).double().sum()
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=p.dtype))
                gradient[start : start + CHUNK] = p.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.hidden_dtype = hidden.dtype
        return (total / len(rows)).to(exact)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.hidden_dtype) * (outer[0] / len(gradient)), None, None


def next_token_loss(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss in nats of predicting tokens 1.. from the states before them.

    Args:
        hidden: [text, position, d_model], after the final norm.
        head: [vocabulary, d_model], the unembedding; it gets no gradient.
        tokens: [text, position], every text of one length.

    >>> hidden, head = torch.zeros(1, 3, 4), torch.randn(10, 4)
    >>> round(next_token_loss(hidden, head, torch.tensor([[1, 2, 3]])).item(), 4)
    2.3026
    """
    loss = _FrozenHeadLoss.apply(hidden[:, :-1].flatten(0, 1), head, tokens[:, 1:].flatten())
    assert isinstance(loss, Tensor)
    return loss
