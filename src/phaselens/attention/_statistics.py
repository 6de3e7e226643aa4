"""What each query and each key does in the softmax: sinks, entropy, received mass, mass by distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention._gather import (
    Distance,
    Entropy,
    Make,
    Mass,
    Received,
    Window,
    gather,
    gather_near,
    real_queries,
    redo,
)
from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem, SoftmaxOptions, no_gradient
from phaselens.attention._strips import strips
from phaselens.errors import InputError, require_flag, require_tensor, require_whole

_TOGETHER = 16
"""Keys scored beside the wanted one: a matrix product rounds as the fused kernel does, a single dot may not."""


@dataclass(frozen=True)
class Summary:
    """What `summarise` was asked for; the rest is None. float32, float64 for float64 inputs.

    sink: [batch, head, query], the mass each query gives one key, a fraction of 1.
    entropy: [batch, head, query], nats.
    received: [batch, head, key], the mass each key receives, in queries.
    distance: [batch, head, distance], the mass given so many positions back, in queries.
    lse: [batch, head, query], the log-sum-exp as `refine_lse` gives it.
    """

    sink: Tensor | None = None
    entropy: Tensor | None = None
    received: Tensor | None = None
    distance: Tensor | None = None
    lse: Tensor | None = None


def summarise(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    position: int | None = None,
    entropy: bool = False,
    received: bool = False,
    distances: int | None = None,
    refine: bool = False,
    lengths: Tensor | None = None,
    real: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Summary:
    """`sink_mass` of a key, `row_entropy`, `received_mass`, `distance_mass` (distances 0 … `distances` − 1) and
    `refine_lse`: those asked for, in one pass.

    Arguments as in those functions; `real` [batch, query], True where a query counts, says in place of `lengths` which
    are no pads. Entropy, received mass, sink and some distances together cost about what one
    call of a fused kernel costs; the sink alone costs next to nothing.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> found = summarise(x, x, lse, scale=1.0, position=0, received=True)
    >>> found.entropy is None, [round(value, 4) for value in found.received[0, 0].tolist()]
    (True, [2.0833, 1.0833, 0.5833, 0.25])
    """
    problem = _checked("summarise", q, k, lse, options)
    for name, flag in (("entropy", entropy), ("received", received), ("refine", refine)):
        require_flag(name, flag)
    if distances is not None:
        require_whole("distances", distances, 1)
    if real is not None:
        require_tensor("real", real)
        if real.dtype != torch.bool:
            raise InputError(f"expected real [batch, query] as a bool tensor, received {real.dtype}")
    if real is not None and (lengths is not None or real.shape != (q.shape[0], q.shape[2])):
        raise ValueError(
            f"expected either lengths or real [batch, query] = {(q.shape[0], q.shape[2])}, received real "
            f"{tuple(real.shape)}{'' if lengths is None else ' and lengths'}"
        )
    real = real_queries(problem, lengths) if real is None else real
    makes: dict[str, Make] = {}
    if position is not None:
        require_whole("position", position)
        if not 0 <= position < problem.n_keys:
            raise ValueError(f"expected a position in 0 … {problem.n_keys - 1}, received {position}")
        # By one way or the other whatever else is asked for: the last digits must not depend on that.
        if not _has_exact_lse(q):
            makes["sink"] = lambda problem, real: Mass(problem, position)
    if received:
        makes["received"] = Received
    if distances is not None:
        makes["distance"] = _distance(distances)
    if entropy:
        makes["entropy"] = lambda problem, real: Entropy(problem)
    large = beyond_single(problem, lse)
    sink = None
    if position is not None and "sink" not in makes:
        sink = _column(problem, lse, large, position)
    gathered = gather(problem, lse, large, list(makes.values()), real) if makes else []
    refined = _refined(problem, lse, large) if refine else None
    return Summary(**{"sink": sink, "lse": refined, **dict(zip(makes, gathered, strict=True))})


def _has_exact_lse(q: Tensor) -> bool:
    """Whether the fused kernel's log-sum-exp is exact enough to divide a single weight by: in half precision, the CPU's
    takes its exponentials with an error of 6e-5."""
    return q.device.type != "cpu" or q.dtype in (torch.float32, torch.float64)


def _distance(longest: int, whole: bool = True) -> Make:
    return lambda problem, real: Distance(problem, real, longest, whole)


def sink_mass(
    q: Tensor, k: Tensor, lse: Tensor, position: int = 0, **options: Unpack[SoftmaxOptions]
) -> Tensor:
    """Attention mass [batch, head, query] that each query gives the key at `position`, a fraction of 1.

    exp(s − lse): one dot product a row; exactly 0 where the query cannot see that key. `lse` and the
    options are those of `attend`. Gu et al. 2024 (2410.10781), section 3.

    Raises ValueError where shapes do not fit, RuntimeError where a gradient would be needed.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in sink_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.0, 0.5, 0.3333, 0.25]
    """
    require_whole("position", position)
    return _there(summarise(q, k, lse, position=position, **options).sink)


def row_entropy(q: Tensor, k: Tensor, lse: Tensor, **options: Unpack[SoftmaxOptions]) -> Tensor:
    """Entropy [batch, head, query] in nats of each query's attention, −Σ p ln p over the real keys.

    With learned sinks p is not renormalised: their column only takes its share. 0 for a query that sees
    nothing. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in row_entropy(x, x, lse, scale=1.0).exp()[0, 0].tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    return _there(summarise(q, k, lse, entropy=True, **options).entropy)


def received_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Attention mass [batch, head, key] that each key receives, Σ_i p_ij, in queries.

    `lengths` [batch] are the numbers of real tokens of right-padded texts: queries at positions from
    there on are not counted, whatever they hold. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 3, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in received_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333, 0.3333]
    """
    return _there(summarise(q, k, lse, received=True, lengths=lengths, **options).received)


def distance_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    longest: int | None = None,
    lengths: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Attention mass [batch, head, distance] given to keys so many positions back, Σ_i p_i,i−distance.

    In queries; distance 0 is a query's own key. A text of n tokens has n − distance such pairs, by which
    to divide for the mean (METRICS 2.3: a(dist)); with a window, none at distances from the
    window on. With `longest`, distances 0 … longest − 1 only, at a cost of O(query · longest).
    `lengths` as in `received_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 3, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in distance_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333, 0.3333]
    >>> [round(value, 4) for value in distance_mass(x, x, lse, longest=2, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333]
    """
    problem = _checked("distance_mass", q, k, lse, options)
    real = real_queries(problem, lengths)
    if longest is None:
        return gather(problem, lse, beyond_single(problem, lse), [_distance(problem.n_keys)], real)[0]
    require_whole("longest", longest, 1)
    return gather_near(problem, lse, longest, lambda whole: _distance(longest, whole), real)


def window_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    width: int,
    *,
    include_self: bool = False,
    exclude_first: bool = True,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Attention mass [batch, head, query] that each query gives the `width` keys before it, a fraction of 1.

    Neither its own key, unless `include_self`, nor key 0, if `exclude_first`: a sink is no locality. With
    width 0 and `include_self`, a query's mass on itself. Costs O(query · width). Options and errors as in
    `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 5, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in window_mass(x, x, lse, 2, scale=1.0)[0, 0].tolist()]
    [0.0, 0.0, 0.3333, 0.5, 0.4]
    """
    problem = _checked("window_mass", q, k, lse, options)
    require_whole("width", width)
    require_flag("include_self", include_self)
    require_flag("exclude_first", exclude_first)
    if width < 0 or (width == 0 and not include_self):
        raise ValueError(f"expected a width of at least 1, or 0 with include_self, received {width}")

    def make(whole: bool) -> Make:
        return lambda problem, real: Window(problem, width, include_self, exclude_first, whole)

    return gather_near(problem, lse, width + 1, make)


def refine_lse(q: Tensor, k: Tensor, lse: Tensor, **options: Unpack[SoftmaxOptions]) -> Tensor:
    """`lse`, with the heads whose scores are too large for float32 computed anew in float64.

    The same tensor if there is none. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 5, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> refine_lse(x, x, lse, scale=1.0) is lse
    True
    """
    return _there(summarise(q, k, lse, refine=True, **options).lse)


def _refined(problem: Problem, lse: Tensor, large: Tensor) -> Tensor:
    heads = large.nonzero().tolist()
    if heads:
        lse = lse.clone()
    for batch, head in heads:
        for strip in strips(problem.head(batch, head)):
            lse[batch, head, slice(*strip.rows)] = (strip.total.log() + strip.reference)[0, 0].to(lse.dtype)
    return lse


def _checked(name: str, q: Tensor, k: Tensor, lse: Tensor, options: SoftmaxOptions) -> Problem:
    no_gradient(name, q, k, lse, options.get("sinks"))
    problem = Problem(q, k, **options)
    require_tensor("lse", lse)
    if lse.shape != q.shape[:3]:
        raise ValueError(
            f"expected lse [batch, head, query] = {tuple(q.shape[:3])}, received {tuple(lse.shape)}"
        )
    return problem


def _there(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def _column(problem: Problem, lse: Tensor, large: Tensor, position: int) -> Tensor:
    """The mass on one key, [batch, head, query], without a pass over the others."""
    mass = _exp_column(problem, lse, position)
    for batch, head in large.nonzero().tolist():
        precise = redo(problem, batch, head, [lambda problem, real: Mass(problem, position)], None)
        mass[batch, head] = precise[0].to(mass.dtype)
    return mass


def _exp_column(problem: Problem, lse: Tensor, position: int) -> Tensor:
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
