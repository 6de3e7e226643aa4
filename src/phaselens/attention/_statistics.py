"""What each query and each key does in the softmax, from strips of it: sinks, entropy, received mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem, no_gradient
from phaselens.attention._strips import Strip, strips

_TOGETHER = 16
"""Keys scored beside the wanted one: a matrix product rounds as the fused kernel does, a single dot may not."""


@dataclass(frozen=True)
class Summary:
    """What `summarise` was asked for; the rest is None. float32, float64 for float64 inputs.

    sink: [batch, head, query], the mass each query gives one key, a fraction of 1.
    entropy: [batch, head, query], nats.
    received: [batch, head, key], the mass each key receives, in queries.
    """

    sink: Tensor | None = None
    entropy: Tensor | None = None
    received: Tensor | None = None


def summarise(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    position: int | None = None,
    entropy: bool = False,
    received: bool = False,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Summary:
    """`sink_mass` of key `position`, `row_entropy` and `received_mass`, those asked for, in one pass.

    Arguments as in those functions; all three together cost what one of the last two costs alone.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> found = summarise(x, x, lse, scale=1.0, position=0, received=True)
    >>> found.entropy is None, [round(value, 4) for value in found.received[0, 0].tolist()]
    (True, [2.0833, 1.0833, 0.5833, 0.25])
    """
    no_gradient("summarise", q, k, lse, sinks)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    if lse.shape != q.shape[:3]:
        raise ValueError(
            f"expected lse [batch, head, query] = {tuple(q.shape[:3])}, received {tuple(lse.shape)}"
        )
    if position is not None and not 0 <= position < problem.n_keys:
        raise ValueError(f"expected a position in 0 … {problem.n_keys - 1}, received {position}")
    found = _Found(problem, position, entropy, received, _real_queries(problem, lengths))
    large = beyond_single(problem, lse)
    if not large.all():
        if entropy or received:
            for strip in strips(problem, lse):
                found.add(strip)
        elif position is not None:
            found.sink = _one_column(problem, lse, position)
    for batch, head in large.nonzero().tolist():
        found.redo(problem, batch, head)
    return Summary(found.sink, found.entropy, found.received)


def sink_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    position: int = 0,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention mass [batch, head, query] that each query gives the key at `position`, a fraction of 1.

    exp(s − lse): one dot product a row; exactly 0 where the query cannot see that key. `lse` and the
    keyword arguments are those of `attend`. Gu et al. 2024 (2410.10781), section 3.

    Raises ValueError where shapes do not fit, RuntimeError where a gradient would be needed.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in sink_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.0, 0.5, 0.3333, 0.25]
    """
    found = summarise(
        q, k, lse, position=position, scale=scale, mask=mask, window=window, softcap=softcap, sinks=sinks
    )
    assert found.sink is not None
    return found.sink


def row_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Entropy [batch, head, query] in nats of each query's attention, −Σ p ln p over the real keys.

    With learned sinks p is not renormalised: their column only takes its share. 0 for a query that sees
    nothing. Arguments and errors as in `sink_mass`.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in row_entropy(x, x, lse, scale=1.0).exp()[0, 0].tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    found = summarise(
        q, k, lse, entropy=True, scale=scale, mask=mask, window=window, softcap=softcap, sinks=sinks
    )
    assert found.entropy is not None
    return found.entropy


def received_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention mass [batch, head, key] that each key receives, Σ_i p_ij, in queries.

    `lengths` [batch] are the numbers of real tokens of right-padded texts: queries at positions from
    there on are not counted, whatever they hold. Arguments and errors as in `sink_mass`.

    >>> import torch
    >>> x = torch.zeros(1, 1, 3, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in received_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333, 0.3333]
    """
    found = summarise(
        q,
        k,
        lse,
        received=True,
        lengths=lengths,
        scale=scale,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    assert found.received is not None
    return found.received


def refine_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`lse`, with the heads whose scores are too large for float32 computed anew in float64.

    The same tensor if there is none. Arguments and errors as in `sink_mass`.
    """
    no_gradient("refine_lse", q, k, lse, sinks)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    large = beyond_single(problem, lse).nonzero().tolist()
    if large:
        lse = lse.clone()
    for batch, head in large:
        for strip in strips(problem.head(batch, head)):
            lse[batch, head, slice(*strip.rows)] = (strip.total.log() + strip.reference)[0, 0].to(lse.dtype)
    return lse


class _Found:
    """The statistics of one problem while they are gathered."""

    def __init__(
        self, problem: Problem, position: int | None, entropy: bool, received: bool, real: Tensor | None
    ) -> None:
        rows, keys = problem.q.shape[:3], (*problem.q.shape[:2], problem.n_keys)
        q, dtype = problem.q, problem.accumulate
        self.position, self.real = position, real
        self.sink = q.new_zeros(rows, dtype=dtype) if position is not None else None
        self.entropy = q.new_zeros(rows, dtype=dtype) if entropy else None
        self.received = q.new_zeros(keys, dtype=dtype) if received else None

    def add(self, strip: Strip) -> None:
        """Add a strip; uses its log_p up."""
        first, last = strip.cols
        total = strip.total.masked_fill(strip.total == 0, 1.0)
        if self.sink is not None and self.position is not None and first <= self.position < last:
            self.sink[strip.where] = strip.p[..., self.position - first] / total
        if self.received is not None:
            self.received[strip.batch, strip.heads, first:last] += self._columns(strip, total)
        if self.entropy is not None:
            surprise = strip.log_p.mul_(strip.p).sum(-1)
            self.entropy[strip.where] = (strip.real * total.log() - surprise) / total

    def _columns(self, strip: Strip, total: Tensor) -> Tensor:
        """Σ p / total over the counted queries of a strip, [batch, head, col]."""
        weight = total.reciprocal()
        p = strip.p
        if self.real is not None:
            counted = self.real[strip.batch, None, slice(*strip.rows)]
            if not counted.all():
                weight = weight.masked_fill(~counted, 0.0)
                p = p.masked_fill(~counted[..., None], 0.0)
        return (weight[:, :, None, :] @ p).squeeze(-2)

    def redo(self, problem: Problem, batch: int, head: int) -> None:
        """Compute one head again in float64, and put it in place."""
        real = None if self.real is None else self.real[batch : batch + 1]
        precise = problem.head(batch, head)
        found = _Found(precise, self.position, self.entropy is not None, self.received is not None, real)
        for strip in strips(precise):
            found.add(strip)
        for mine, exact in (
            (self.sink, found.sink),
            (self.entropy, found.entropy),
            (self.received, found.received),
        ):
            if mine is not None and exact is not None:
                mine[batch, head] = exact[0, 0].to(mine.dtype)


def _one_column(problem: Problem, lse: Tensor, position: int) -> Tensor:
    """exp(s − lse) of one key, [batch, head, query]."""
    dtype, group = problem.accumulate, problem.group
    batch, n_heads, n_queries, d_head = problem.q.shape
    first = max(0, min(position, problem.n_keys - _TOGETHER))
    keys = problem.k[:, :, first : first + _TOGETHER].to(dtype).transpose(-1, -2)
    queries = problem.q.to(dtype).reshape(batch, n_heads // group, group * n_queries, d_head)
    scores = (queries @ keys)[..., position - first].reshape(lse.shape) * problem.scale
    if problem.softcap is not None:
        scores = torch.tanh(scores / problem.softcap) * problem.softcap
    hidden, bias = problem.block((0, n_queries), (position, position + 1))
    if bias is not None:
        scores = scores + bias.squeeze(-1)
    mass = (scores - lse).exp()
    return mass if hidden is None else mass.masked_fill(hidden.squeeze(-1), 0.0)


def _real_queries(problem: Problem, lengths: Tensor | None) -> Tensor | None:
    """[batch, query], True where a query is no pad."""
    if lengths is None:
        return None
    batch = problem.q.shape[0]
    if lengths.shape != (batch,):
        raise ValueError(f"expected lengths [batch] = ({batch},), received {tuple(lengths.shape)}")
    position = torch.arange(problem.n_queries, device=problem.q.device) + problem.offset
    return position[None, :] < lengths.to(problem.q.device)[:, None]
