"""Attention statistics of each query and key: sink mass, entropy, received mass, mass by distance or window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention._accumulators import (
    DistanceMass,
    KeyMass,
    LargeHeads,
    MakeAccumulator,
    OwnMass,
    ReceivedMass,
    RowEntropy,
    RowLargest,
    SegmentMass,
    TopKey,
    WindowMass,
    accumulate,
    accumulate_band,
    accumulate_head,
    real_queries,
)
from phaselens.attention._arguments import require_key_indices, require_no_gradient
from phaselens.attention._key_blocks import key_blocks
from phaselens.attention._precision import large_heads
from phaselens.attention._problem import Problem, SoftmaxOptions
from phaselens.errors import InputError, require_flag, require_tensor, require_whole

_N_KEYS_IN_PRODUCT = 16
"""Keys scored together: a matrix product rounds as the fused kernel does, a single dot product may not."""


@dataclass(frozen=True)
class Summary:
    """The statistics that `summarise` computed; the others are None. float32, float64 for float64 inputs.

    sink: [batch, head, query], the mass of each query on one key, a fraction of 1.
    itself: [batch, head, query], the mass of each query on its own key, a fraction of 1.
    entropy: [batch, head, query], nats.
    received: [batch, head, key], the mass each key receives, in queries.
    distance: [batch, head, distance], the mass given to keys `distance` positions back, in queries.
    segments: [batch, head, query, segment], the mass of each query on each segment of keys, a fraction of 1.
    top: [batch, head, query, 2], the key with the query's largest weight, the first of several, and how many they are.
    largest: [batch, head, query], the largest |q·k| of the query and a key that it sees, without scale; NaN for a query
    that sees nothing. Rounded as scores are: by some 1e-7 of the row's log-sum-exp, or of the product.
    lse: [batch, head, query], the log-sum-exp from `refine_lse`.
    """

    sink: Tensor | None = None
    itself: Tensor | None = None
    entropy: Tensor | None = None
    received: Tensor | None = None
    distance: Tensor | None = None
    segments: Tensor | None = None
    top: Tensor | None = None
    largest: Tensor | None = None
    lse: Tensor | None = None


def summarise(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    position: int | None = None,
    itself: bool = False,
    entropy: bool = False,
    received: bool = False,
    distances: int | None = None,
    segments: Tensor | None = None,
    n_segments: int | None = None,
    top: bool = False,
    largest: bool = False,
    refine: bool = False,
    lengths: Tensor | None = None,
    real: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Summary:
    """Compute the requested statistics in one pass: `sink_mass` of `position`, each query's mass on its own key
    (`itself`), `row_entropy`, `received_mass`, `distance_mass` (distances 0 … `distances` − 1), `segment_mass` of
    `segments`, the `top_keys`, each query's largest product (`largest`), and `refine_lse`.

    Arguments as in those functions; `real` [batch, query], True where a query is not a pad, replaces `lengths`.
    Entropy, received mass, sink and some distances together cost about one call of a fused kernel; the sink alone
    costs next to nothing.

    Raises:
        InputError: for real that is not bool.
        ValueError: for real of another shape, or together with lengths, and for a position that is no key.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> summary = summarise(x, x, lse, scale=1.0, position=0, received=True)
    >>> summary.entropy is None, [round(value, 4) for value in summary.received[0, 0].tolist()]
    (True, [2.0833, 1.0833, 0.5833, 0.25])
    """
    problem = _checked_problem("summarise", q, k, lse, options)
    flags = {"itself": itself, "entropy": entropy, "received": received, "top": top, "largest": largest}
    for name, flag in {**flags, "refine": refine}.items():
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
    makers: dict[str, MakeAccumulator] = {}
    if position is not None:
        require_whole("position", position)
        if not 0 <= position < problem.n_keys:
            raise ValueError(f"expected a position in 0 … {problem.n_keys - 1}, received {position}")
        # Independent of the other statistics requested, so that the last digits do not depend on them.
        if not has_exact_lse(problem):
            makers["sink"] = lambda problem, real: KeyMass(problem, position)
    if itself:
        makers["itself"] = lambda problem, real: OwnMass(problem)
    if received:
        makers["received"] = ReceivedMass
    if distances is not None:
        makers["distance"] = _distance_maker(distances)
    if segments is not None:
        makers["segments"] = _segment_maker(problem, segments, n_segments)
    if top:
        makers["top"] = lambda problem, real: TopKey(problem)
    if largest:
        makers["largest"] = lambda problem, real: RowLargest(problem)
    if entropy:  # the last one: it overwrites the blocks
        makers["entropy"] = lambda problem, real: RowEntropy(problem)
    large = large_heads(problem, problem.relative(lse))
    sink = None
    if position is not None and "sink" not in makers:
        sink = _key_mass(problem, lse, large, position)
    results = accumulate(problem, lse, large, list(makers.values()), real) if makers else []
    refined = _refined(problem, lse, large) if refine else None
    return Summary(**{"sink": sink, "lse": refined, **dict(zip(makers, results, strict=True))})


def has_exact_lse(problem: Problem) -> bool:
    """Return whether the fused kernel's log-sum-exp is exact enough to divide a single weight by.

    In half precision, the CPU kernel computes its exponentials with an error of 6e-5. With a bias, a log-sum-exp may be
    so large that float32 rounds it by as much.
    """
    if problem.bias is not None:
        return False
    q = problem.q
    return q.device.type != "cpu" or q.dtype in (torch.float32, torch.float64)


def _distance_maker(longest: int, whole_rows: bool = True) -> MakeAccumulator:
    return lambda problem, real: DistanceMass(problem, real, longest, whole_rows)


def _segment_maker(problem: Problem, labels: Tensor, n_segments: int | None) -> MakeAccumulator:
    require_key_indices("segments", labels, len(problem.q))
    if labels.shape[1] != problem.n_keys:
        raise ValueError(
            f"expected segments [batch | 1, key] with {problem.n_keys} keys, received {tuple(labels.shape)}"
        )
    if n_segments is not None:
        require_whole("n_segments", n_segments, 1)
    n = int(labels.max()) + 1 if n_segments is None else n_segments
    return lambda problem, real: SegmentMass(problem, labels, n)


def sink_mass(
    q: Tensor, k: Tensor, lse: Tensor, position: int = 0, **options: Unpack[SoftmaxOptions]
) -> Tensor:
    """Return the attention mass [batch, head, query] of each query on the key at `position`, a fraction of 1.

    exp(s − lse): one dot product per row; exactly 0 where the query cannot see that key. `lse` and the
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
    return _present(summarise(q, k, lse, position=position, **options).sink)


def row_entropy(q: Tensor, k: Tensor, lse: Tensor, **options: Unpack[SoftmaxOptions]) -> Tensor:
    """Return the entropy [batch, head, query] in nats of each query's attention, −Σ p ln p over the real keys.

    With sink logits p is not renormalised; their column has its share of the mass. 0 for a query that
    sees nothing. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in row_entropy(x, x, lse, scale=1.0).exp()[0, 0].tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    return _present(summarise(q, k, lse, entropy=True, **options).entropy)


def received_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Return the attention mass [batch, head, key] that each key receives, Σ_i p_ij, in queries.

    `lengths` [batch] are the numbers of real tokens of right-padded texts: queries from those positions
    on are not counted, whatever their values. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 3, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in received_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333, 0.3333]
    """
    return _present(summarise(q, k, lse, received=True, lengths=lengths, **options).received)


def distance_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    longest: int | None = None,
    lengths: Tensor | None = None,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:
    """Return the attention mass [batch, head, distance] on keys `distance` positions back, Σ_i p_i,i−distance.

    In queries; distance 0 is a query's own key. A text of n tokens has n − distance such pairs; divide by
    that for the mean (METRICS 2.3: a(dist)). With a window, distances from the window on have no mass. With
    `longest`, distances 0 … longest − 1 only, at a cost of O(query · longest).
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
    problem = _checked_problem("distance_mass", q, k, lse, options)
    real = real_queries(problem, lengths)
    if longest is None:
        large = large_heads(problem, problem.relative(lse))
        return accumulate(problem, lse, large, [_distance_maker(problem.n_keys)], real)[0]
    require_whole("longest", longest, 1)
    return accumulate_band(
        problem, lse, longest, lambda whole_rows: _distance_maker(longest, whole_rows), real
    )


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
    """Return the attention mass [batch, head, query] of each query on the `width` keys before it, a fraction of 1.

    A query's own key counts only with `include_self`, and key 0 only without `exclude_first`, because attention
    to a sink is not local. With width 0 and `include_self`, a query's mass on itself. Costs O(query · width).
    Options and errors as in `sink_mass`.

    Raises:
        ValueError: for a width below 1, or 0 without include_self.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 5, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in window_mass(x, x, lse, 2, scale=1.0)[0, 0].tolist()]
    [0.0, 0.0, 0.3333, 0.5, 0.4]
    """
    problem = _checked_problem("window_mass", q, k, lse, options)
    require_whole("width", width)
    require_flag("include_self", include_self)
    require_flag("exclude_first", exclude_first)
    if width < 0 or (width == 0 and not include_self):
        raise ValueError(f"expected a width of at least 1, or 0 with include_self, received {width}")

    def make(whole_rows: bool) -> MakeAccumulator:
        return lambda problem, real: WindowMass(problem, width, include_self, exclude_first, whole_rows)

    return accumulate_band(problem, lse, width + 1, make)


def refine_lse(q: Tensor, k: Tensor, lse: Tensor, **options: Unpack[SoftmaxOptions]) -> Tensor:
    """Recompute `lse` [batch, head, query] in float64 for the heads whose scores are too large for float32.

    The same tensor if there are none. Options and errors as in `sink_mass`.

    >>> import torch
    >>> from phaselens.attention import attend
    >>> x = torch.zeros(1, 1, 5, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> refine_lse(x, x, lse, scale=1.0) is lse
    True
    """
    return _present(summarise(q, k, lse, refine=True, **options).lse)


def _refined(problem: Problem, lse: Tensor, large: LargeHeads) -> Tensor:
    if large:
        lse = lse.clone()
    for batch, head in large:
        precise = problem.head(batch, head)
        for block in key_blocks(precise):
            rows = slice(*block.rows)
            exact = block.total.log() + block.reference
            if precise.row_shift is not None:
                exact = exact + precise.row_shift[:, :, rows]
            lse[batch, head, rows] = exact[0, 0].to(lse.dtype)
    return lse


def _checked_problem(name: str, q: Tensor, k: Tensor, lse: Tensor, options: SoftmaxOptions) -> Problem:
    require_no_gradient(name, q, k, lse, options.get("sink_logits"))
    problem = Problem(q, k, **options)
    require_tensor("lse", lse)
    if lse.shape != q.shape[:3]:
        raise ValueError(
            f"expected lse [batch, head, query] = {tuple(q.shape[:3])}, received {tuple(lse.shape)}"
        )
    return problem


def _present(statistic: Tensor | None) -> Tensor:
    assert statistic is not None
    return statistic


def _key_mass(problem: Problem, lse: Tensor, large: LargeHeads, position: int) -> Tensor:
    """Return the mass on one key, [batch, head, query], without a pass over the other keys."""
    mass = _key_mass_from_lse(problem, lse, position)
    for batch, head in large:
        precise = accumulate_head(
            problem, batch, head, [lambda problem, real: KeyMass(problem, position)], None
        )
        mass[batch, head] = precise[0].to(mass.dtype)
    return mass


def _key_mass_from_lse(problem: Problem, lse: Tensor, position: int) -> Tensor:
    dtype, group = problem.compute_dtype, problem.group
    batch, n_heads, n_queries, d_head = problem.q.shape
    first = max(0, min(position, problem.n_keys - _N_KEYS_IN_PRODUCT))
    keys = problem.k[:, :, first : first + _N_KEYS_IN_PRODUCT].to(dtype).transpose(-1, -2)
    queries = problem.q.to(dtype).reshape(batch, n_heads // group, group * n_queries, d_head)
    scores = (queries @ keys)[..., position - first].reshape(lse.shape) * problem.scale
    if problem.softcap is not None:
        scores = torch.tanh(scores / problem.softcap) * problem.softcap
    hidden, bias = problem.mask_block((0, n_queries), (position, position + 1))
    if bias is not None:
        scores = scores + bias.squeeze(-1)
    mass = (scores - lse).exp()
    return mass if hidden is None else mass.masked_fill(hidden.squeeze(-1), 0.0)
