"""Training batches as a pure function of recipe and step: a resumed run sees what the killed one would have seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tools.train_pair.corpus import BOS_ID, MARK_ID, Tokens
from tools.train_pair.recipe import PairRecipe


def with_copies(source: Tokens, rate: float, depth: int, rng: np.random.Generator) -> Tokens:
    """Interleave copies: a chosen token is followed by k marks and then by the k-th token back.

    k is uniform in 1..depth, but never reaches before the start of `source`, [tokens]. With depth 1 the copy is
    "token, mark, the same token". The result is longer than `source`.
    """
    chosen = np.flatnonzero(rng.random(source.size) < rate)
    reach = np.minimum(rng.integers(1, depth + 1, size=chosen.size), chosen + 1)
    copied = source[chosen + 1 - reach]
    # np.insert keeps the given order at equal places: the marks first, then the copy.
    copy_starts = np.repeat(chosen + 1, reach + 1)
    inserted = np.full(copy_starts.size, MARK_ID, dtype=source.dtype)
    inserted[np.cumsum(reach + 1) - 1] = copied
    return np.insert(source, copy_starts, inserted)


def batch(stream: Tokens, recipe: PairRecipe, step: int) -> npt.NDArray[np.int64]:
    """Return the batch of `step`, [sequences, length], each row `<s>` and a random window of the books with copies.

    The length cycles through `recipe.lengths`, so that late positions are trained too.
    """
    rng = np.random.default_rng((recipe.seed, step))
    length = recipe.lengths[step % len(recipe.lengths)]
    rows = np.full((recipe.batch_at(step) // length, length), BOS_ID, dtype=np.int64)
    for row in rows:
        start = int(rng.integers(0, stream.size - length))
        window = np.asarray(stream[start : start + length - 1])
        row[1:] = with_copies(window, recipe.copy_rate, recipe.copy_depth, rng)[: length - 1]
    return rows
