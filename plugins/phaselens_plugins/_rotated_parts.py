"""The rotated and the unrotated dimensions of a head, in layers whose rotation covers a part of it.

Multi-head latent attention and partial rotary embeddings put both into one head, which then holds its own comparison
of dimensions with a rotation and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Metric, TableSpec
from phaselens_plugins._common import (
    HEAD,
    LAYER,
    Numbers,
    TableRow,
    interval_columns,
    mean_intervals,
    mean_over_texts,
    none_if_nan,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.plugin import RotatedPairs

#: The parts of a head, in the order in which they are stored.
PARTS = ("rotated", "unrotated")
_CELLS, _NORM = "cells", "share of norm"

PARTS_TABLE = TableSpec(
    "parts",
    (
        LAYER,
        HEAD,
        Column("tensor", str, None, "q or k, after rotation"),
        Column("part", str, None, "the dimensions that the rotation mixes, or those that it leaves alone"),
        Column("n_cells", int, _CELLS, "dimensions of the head in this part"),
        Column("count", float, _CELLS, "massive cells, against the mean of all cells; mean over texts"),
        *interval_columns(_CELLS),
        Column("fraction", float, "share of cells", "count as a share of the part's cells"),
        Column("norm_share", float, _NORM, "the part's share of the head's Σ M², mean over texts"),
        Column("null_share", float, _NORM, "the part's share of the head's dimensions"),
    ),
    "rotated and unrotated dimensions of each head, in layers whose rotation covers a part of it (partial rotary, "
    "multi-head latent attention)",
)


def parts_of(d_head: int, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]] | None:
    """Return the dimensions of a head that are rotated, and those that are not; None where either are all.

    >>> parts_of(4, [(2, 3)]), parts_of(2, [(0, 1)])
    (([2, 3], [0, 1]), None)
    """
    rotated = sorted({dimension for pair in pairs for dimension in pair})
    unrotated = sorted(set(range(d_head)) - set(rotated))
    return (rotated, unrotated) if rotated and unrotated else None


def measure_parts(norms: Tensor, pairs: Sequence[tuple[int, int]], multiple: float) -> Numbers:
    """Count the massive cells of each head's parts, and their shares of Σ M²: [head, part, 2] as lists.

    Args:
        norms: [head, d_head], the norm of each cell over a text.
        pairs: the dimensions that the rotation mixes.
        multiple: a cell is massive above this many times the mean cell.

    Returns:
        NaN where the rotation covers all of a head, or nothing.
    """
    import torch

    from phaselens.attention import massive_cells

    parts = parts_of(norms.shape[-1], pairs)
    numbers = torch.full((len(norms), len(PARTS), 2), torch.nan, dtype=torch.float64)
    if parts is not None and bool(norms.isfinite().all()):
        is_massive, squares = massive_cells(norms, multiple, "global"), norms.double().square()
        for index, dimensions in enumerate(parts):
            numbers[:, index, 0] = is_massive[:, dimensions].sum(-1).double()
            numbers[:, index, 1] = squares[:, dimensions].sum(-1) / squares.sum(-1)
    listed: Numbers = numbers.tolist()
    return listed


def part_rows(
    metric: Metric[Any], rotations: Sequence[RotatedPairs | None], n_cells_of: Callable[[str], np.ndarray]
) -> Iterator[TableRow]:
    """Yield the rows of `PARTS_TABLE`, from numbers stored under `q.parts` and `k.parts`.

    `n_cells_of` returns heads × dimensions of a tensor, [layer], from which the number of heads follows.
    """
    import numpy as np

    for tensor in ("q", "k"):
        if not metric.per_text.layers(f"{tensor}.parts"):
            continue
        numbers = metric.per_text.stack(f"{tensor}.parts")
        means, lows, highs = mean_intervals(metric, numbers[..., 0])
        shares = mean_over_texts(numbers[..., 1])
        n_cells_in = n_cells_of(tensor)
        for layer, head, index in np.ndindex(numbers.shape[1:4]):
            rotation = rotations[layer]
            parts = None if rotation is None else parts_of(rotation.d_head, rotation.pairs)
            if rotation is None or parts is None or (head + 1) * rotation.d_head > n_cells_in[layer]:
                continue
            n_cells, mean = len(parts[index]), means[layer][head][index]
            yield (
                layer, head, tensor, PARTS[index], n_cells, mean, lows[layer][head][index],
                highs[layer][head][index], None if mean is None else mean / n_cells,
                none_if_nan(shares[layer, head, index]), n_cells / sum(map(len, parts)),
            )  # fmt: skip
