"""Books made of a few words, and the comparison of weights, for tests of what is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def write_books(folder: Path, words: Sequence[str], n_lines: int) -> Path:
    """Write `one.txt`, `two.txt` and `kept.txt`, with `n_lines` sentences of twelve random words each."""
    rng = np.random.default_rng(0)
    for name in ("one", "two", "kept"):
        lines = (" ".join(rng.choice(words, size=12)).capitalize() + "." for _ in range(n_lines))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with exactly the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
