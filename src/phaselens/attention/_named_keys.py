"""Attention with other scores for a few named keys, exact, from one call of a kernel without these keys.

A row's output is a mean of the named keys' values and of what the row reads from all other keys, weighted by the
softmax of the named keys' scores and the log-sum-exp of the others. So one call without the named keys serves any
number of changes of their scores. The quotient (o − p·v) / (1 − p) is the same in exact arithmetic, but loses all
digits where the named keys have all of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention import _kernels, _key_blocks
from phaselens.attention._arguments import require_key_indices, require_no_gradient
from phaselens.attention._attend import check_values
from phaselens.attention._precision import large_heads
from phaselens.attention._problem import Problem, SoftmaxOptions
from phaselens.attention._statistics import has_exact_lse
from phaselens.errors import InputError, require_kind, require_tensor


def key_scores(q: Tensor, k: Tensor, keys: Tensor, **options: Unpack[SoftmaxOptions]) -> Tensor:
    """Return the scores [batch, head, query, n] of the named keys, −inf where a query does not see the key.

    keys [batch | 1, n] are indices of keys, by text, −1 for no key. Scores are scaled, capped and biased, as they enter
    the softmax; float64 (float32 on a device without it). Options: `SoftmaxOptions`.

    >>> q = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    >>> key_scores(q, q, torch.tensor([[1]]), scale=0.5)[0, 0, :, 0].tolist()
    [-inf, 2.0, 3.0]
    """
    problem = Problem(q, k, **options)
    require_key_indices("keys", keys, len(q))
    keys = keys.to(k.device, torch.long).expand(len(q), -1)
    batch, n_heads, n_queries, d_head = q.shape
    dtype = torch.float32 if q.device.type == "mps" else torch.float64
    chosen = torch.where((keys < 0) | (keys >= problem.n_keys), 0, keys)
    index = chosen[:, None, :, None].expand(-1, k.shape[1], -1, d_head)
    named = k.gather(2, index).to(dtype)
    grouped = q.to(dtype).reshape(batch, k.shape[1], -1, d_head)
    scores = (grouped @ named.transpose(-1, -2)).view(batch, n_heads, n_queries, -1) * problem.scale
    if problem.softcap is not None:
        scores = torch.tanh(scores / problem.softcap) * problem.softcap
    hidden, bias = problem.mask_of_keys(keys)
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(hidden, -torch.inf)


@dataclass(frozen=True)
class Remainder:
    """What each row reads from all keys but the named ones: `out` [batch, head, query, d_v] and its log-sum-exp `lse`
    [batch, head, query] in nats, a sink logit's column included."""

    out: Tensor
    lse: Tensor

    def weights(self, scores: Tensor) -> Tensor:
        """Return the attention [batch, head, query, n] on the named keys if they have these scores; 0 in a row without
        any attention.

        >>> rest = Remainder(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> rest.weights(torch.tensor([[[[0.0, -torch.inf]]]])).tolist()
        [[[[0.5, 0.0]]]]
        """
        return self._shares(scores, scores)

    def output(self, v: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
        """Return the attention's output [batch, head, query, d_v] if the named keys have these scores.

        v [batch, kv_head, key, d_v] and keys [batch | 1, n] as in `attend_without`; the dtype is that of `out`.
        """
        dtype = self.out.dtype
        keys = keys.to(v.device, torch.long).expand(len(v), -1)
        chosen = torch.where((keys < 0) | (keys >= v.shape[2]), 0, keys)
        values = v.gather(2, chosen[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3])).to(dtype)
        named = _key_blocks.mix(self.weights(scores).to(dtype), values)
        return named + self.out * self._shares(self.lse[..., None], scores).to(dtype)

    def _shares(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Return exp(logits) over the row's total; 0 in a row without any attention."""
        total = torch.logaddexp(self.lse, scores.logsumexp(-1))[..., None]
        return torch.where(total == -torch.inf, 0.0, (logits - total).exp())


def attend_without(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, **options: Unpack[SoftmaxOptions]
) -> Remainder:
    """Attend to all keys but the named ones, in O(query) memory; a row without other keys has out 0 and lse −inf.

    keys [batch | 1, n] are indices of keys, by text, −1 for no key. Other arguments and errors as in `attend`; `lse` is
    float64 (float32 on a device without it). Heads whose scores are too large for float32 are computed in float64.

    >>> x = torch.zeros(1, 1, 3, 1)
    >>> v = torch.tensor([8.0, 2.0, 4.0]).view(1, 1, 3, 1)
    >>> rest = attend_without(x, x, v, torch.tensor([[0]]), scale=1.0)
    >>> rest.out[0, 0, :, 0].tolist(), rest.lse.exp()[0, 0].round().tolist()
    ([0.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    """
    sink_logits = options.get("sink_logits")
    require_no_gradient("attend_without", q, k, v, sink_logits, options.get("bias"))
    problem = Problem(q, k, **options)
    problem = replace(problem, hidden_keys=_joined(keys, problem.hidden_keys, len(q)))
    check_values(k, v)
    attend = _kernels.attend if has_exact_lse(problem) else _key_blocks.attend
    out, kernel_lse = attend(problem, v)
    large = large_heads(problem, kernel_lse)
    lse = kernel_lse if kernel_lse.device.type == "mps" else kernel_lse.double()
    if large:
        out = out.to(problem.compute_dtype, copy=True)
    for batch, head in large:
        value = v[batch : batch + 1, head // problem.group : head // problem.group + 1].double()
        exact_out, exact_lse = _key_blocks.attend(problem.head(batch, head), value)
        out[batch, head], lse[batch, head] = exact_out[0, 0].to(out.dtype), exact_lse[0, 0]
    if problem.row_shift is not None:
        lse = lse + problem.row_shift.to(lse.dtype)
    if sink_logits is not None:
        total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[None, :, None])
        out, lse = out * (lse - total).exp().to(out.dtype)[..., None], total
    return Remainder(out, lse)


def _joined(keys: Tensor, hidden: Tensor | None, n_texts: int) -> Tensor:
    require_key_indices("keys", keys, n_texts)
    if hidden is None:
        return keys
    return torch.cat([keys.expand(n_texts, -1), hidden.to(keys.device).expand(n_texts, -1)], -1)


def reweighted(
    own: Tensor, rest: Remainder, v: Tensor, keys: Tensor, scores: Tensor, edited: Tensor
) -> Tensor:
    """Return the output [batch, head, query, d_v] with the scores `edited` [batch, head, query, n] of the named keys in
    place of `scores`.

    A row whose attention on the named keys stays the same, to the precision of `own`, keeps `own`, the attention's
    output with `scores`, bit for bit.

    Raises:
        InputError: for a row that would attend to nothing; it attends to the named keys only.

    >>> x = torch.zeros(1, 1, 3, 1)
    >>> v = torch.tensor([8.0, 2.0, 4.0]).view(1, 1, 3, 1)
    >>> keys = torch.tensor([[0]])
    >>> scores, rest = key_scores(x, x, keys, scale=1.0), attend_without(x, x, v, keys, scale=1.0)
    >>> edited = scores.clone()
    >>> edited[:, :, 1:] = -torch.inf
    >>> own = torch.tensor([8.0, 5.0, 14 / 3]).view(1, 1, 3, 1)
    >>> reweighted(own, rest, v, keys, scores, edited)[0, 0, :, 0].tolist()
    [8.0, 2.0, 3.0]
    """
    for name, tensor in (("own", own), ("v", v)):
        require_tensor(name, tensor, "batch", "head", "position", "d_v")
    require_key_indices("keys", keys, len(own))
    is_changed = rows_changed(rest, scores, edited, own.dtype)
    return torch.where(is_changed[..., None], rest.output(v, keys, edited).to(own.dtype), own)


def rows_changed(rest: Remainder, scores: Tensor, edited: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether the attention on a named key changes, to the precision of `dtype` or float32: bool
    [batch, head, query].

    Raises:
        InputError: as `reweighted` does.

    >>> rest, zero = Remainder(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1)), torch.zeros(1, 1, 1, 1)
    >>> rows_changed(rest, zero, zero + 1e-9, torch.float32).tolist()
    [[[False]]]
    """
    require_kind("rest", rest, Remainder, "made by attend_without")
    for name, tensor in (("scores", scores), ("edited", edited)):
        require_tensor(name, tensor, "batch", "head", "query", "n")
    require_kind("dtype", dtype, torch.dtype, "such as torch.float32")
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    before, after = (rest.weights(values).to(precision) for values in (scores, edited))
    is_changed = (before != after).any(-1)
    is_empty = is_changed & (rest.lse == -torch.inf) & (edited == -torch.inf).all(-1)
    if bool(is_empty.any()):
        text, head, query = is_empty.nonzero()[0].tolist()
        raise InputError(
            f"head {head} attends to nothing but the edited keys at query {query} of text {text}: without them, it has "
            "no attention left; leave such queries out of the edit"
        )
    return is_changed
