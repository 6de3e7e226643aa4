"""Columns of a matrix by text: each text has its own key, and some have none."""

from __future__ import annotations

import torch

from phaselens.lens.matrix_statistics import columns


def test_each_text_has_its_own_column_and_zeros_without_one() -> None:
    pattern = torch.rand(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    selected = columns(pattern, [0, 4, -1, 5])
    for text, slot in ((0, 0), (1, 4)):
        assert torch.equal(selected[text], pattern[text, ..., slot])
    assert not selected[2:].any(), "a slot before the first or after the last key is no key"
    assert torch.equal(columns(pattern, [2]), pattern[..., 2])
    assert columns(pattern, [5]).shape == (4, 2, 3)
    assert not columns(pattern, [5]).any()
