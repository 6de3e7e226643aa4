"""Scores of a text from its attention statistics: sink score, normalised entropy, concentration. All in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.attention._accumulators import require_lengths
from phaselens.attention._arguments import require_window
from phaselens.errors import require_flag, require_tensor, require_whole


def query_mean(rows: Tensor, lengths: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
    """Return the mean [batch, head] of rows [batch, head, query] over queries first … length − 1.

    With `last`, only up to that query. `lengths` [batch] are the numbers of real tokens of right-padded texts; rows
    beyond them are not read. The mean of a text without such a query is NaN; the only other cause of NaN is NaN in
    `rows`.

    Raises:
        ValueError: unless rows are [batch, head, query] and lengths [batch].

    >>> import torch
    >>> rows = torch.tensor([[[1.0, 0.5, 0.25, 9.0]]])
    >>> query_mean(rows, torch.tensor([3]), first=1)
    tensor([[0.3750]], dtype=torch.float64)
    """
    require_tensor("rows", rows)
    require_lengths(lengths)
    require_whole("first", first, 0)
    if last is not None:
        require_whole("last", last, 0)
    if rows.ndim != 3 or lengths.shape != rows.shape[:1]:
        raise ValueError(
            "expected rows [batch, head, query] and lengths [batch], "
            f"received {tuple(rows.shape)} and {tuple(lengths.shape)}"
        )
    lengths = lengths.to(rows.device)
    query = torch.arange(rows.shape[-1], device=rows.device)
    counts = (query >= first) & (query < lengths[:, None])
    if last is not None:
        counts &= query <= last
    total = rows.double().masked_fill(~counts[:, None], 0.0).sum(-1)
    number = counts.sum(-1)[:, None]
    return torch.where(number > 0, total / number, torch.nan)


def sink_score(
    sink: Tensor,
    lengths: Tensor,
    *,
    include_query0: bool = False,
    position: int = 0,
    window: int | None = None,
) -> Tensor:
    """Return each text's sink score [batch, head], a fraction of attention: the mean of `sink_mass` of `position`.

    sink [batch, head, query], lengths [batch]. The mean is over the queries that see the key: from `position` on, and
    with a sliding `window` only the first `window` of them. Query 0, which can only attend to itself, is left out
    unless `include_query0` (for other positions it cannot see the key anyway). NaN where a text has no such query.
    METRICS 2.1; Gu et al. 2024, section 3.

    >>> import torch
    >>> sink = torch.tensor([[[1.0, 0.6, 0.5, 0.7, 0.2]]], dtype=torch.float64)
    >>> score = sink_score(sink, torch.tensor([5]))
    >>> round(score.item(), 4), round(sink_score(sink, torch.tensor([5]), include_query0=True).item(), 4)
    (0.5, 0.6)
    >>> round(sink_score(sink, torch.tensor([5]), window=3).item(), 4)  # of queries 1 and 2
    0.55
    """
    require_whole("position", position, 0)
    require_flag("include_query0", include_query0)
    require_tensor("sink", sink)
    if window is not None:
        require_window(window)
    last_query = None if window is None else position + window - 1
    return query_mean(sink, lengths, first=max(position, 0 if include_query0 else 1), last=last_query)


def normalised_entropy(entropy: Tensor, *, window: int | None = None) -> Tensor:
    """Divide row entropies [..., query] by their largest possible value, the log of the number of visible keys.

    0 is all on one key, 1 is uniform; NaN for query 0, which sees one key only. Queries are at positions
    0, 1, …; with `window`, a query sees itself and the window − 1 keys before it. A sink logit is not a key: its
    column is not counted among the visible ones, and its mass is missing from the row, whose entropy is −Σ p ln p
    of the weights as they are. Such a row has 0 where the sink logit takes everything, and with two visible keys it
    can reach 1.06 (weights of 1/e each).

    >>> import torch
    >>> normalised_entropy(torch.tensor([0.0, 0.0, 1.0986123]))
    tensor([   nan, 0.0000, 1.0000], dtype=torch.float64)
    """
    require_tensor("entropy", entropy, "…", "query")
    n_visible = torch.arange(1, entropy.shape[-1] + 1, dtype=torch.float64, device=entropy.device)
    if window is not None:
        require_whole("window", window, 1)
        n_visible = n_visible.minimum(n_visible.new_tensor(float(window)))
    return torch.where(n_visible > 1, entropy.double() / n_visible.log(), torch.nan)


def concentration(received: Tensor, lengths: Tensor) -> Tensor:
    """Return the concentration of received attention, [batch, head]: 0 is even, 1 is all on one key.

    C = 1 + Σ_k c_k ln c_k / ln T with c_k = received_k / T. With sink logits the shares sum to less than 1, and are
    used as they are, so that C is 1 where a sink logit takes everything. received [batch, head, key] comes from
    `received_mass` with the same `lengths`; NaN for a text of one token. METRICS 2.2, ColSum concentration.

    Raises:
        ValueError: unless received is [batch, head, key] and lengths [batch].

    >>> import torch
    >>> concentration(torch.tensor([[[3.0, 0.0, 0.0]]]), torch.tensor([3])).item()
    1.0
    """
    require_tensor("received", received)
    require_lengths(lengths)
    if received.ndim != 3 or lengths.shape != received.shape[:1]:
        raise ValueError(
            "expected received [batch, head, key] and lengths [batch], "
            f"received {tuple(received.shape)} and {tuple(lengths.shape)}"
        )
    size = lengths.to(received.device, torch.float64)[:, None]
    key = torch.arange(received.shape[-1], device=received.device)
    share = received.double().masked_fill(~(key < size)[:, None], 0.0) / size[..., None]
    spread = torch.special.entr(share).sum(-1)
    return torch.where(size > 1, 1 - spread / size.log(), torch.nan)
