"""A lazy mask behaves as the matrix that transformers would build, and builds it only where its cells are needed."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_overlay

from phaselens.lens.lazy_masks import LazyMask, build_lazy_mask

LOWEST = torch.finfo(torch.float32).min
SHAPE = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": torch.device("cpu")}


def window_of_three(batch, head, query, key):
    return causal_mask_function(batch, head, query, key) & sliding_window_overlay(3)(batch, head, query, key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_length": 1},
        {"mask_function": window_of_three, "local_size": 3},
        {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], dtype=torch.bool)},
        {"allow_is_causal_skip": False},
    ],
    ids=["causal", "one query", "window", "padding", "wanted as a tensor"],
)
def test_the_built_mask_is_transformers_own(options: dict[str, object]) -> None:
    arguments = {**SHAPE, **options}
    offset = {"q_offset": 5} if arguments["q_length"] == 1 else {}
    expected = eager_mask(**{**arguments, **offset}, dtype=torch.float32)
    mask = build_lazy_mask(**{**arguments, **offset}, dtype=torch.float32)
    assert isinstance(mask, LazyMask)
    assert mask.shape == expected.shape
    assert torch.equal(mask.built().expand_as(expected), expected)
    assert torch.equal(mask.bool().built(), expected.bool())
    assert torch.equal((mask < -1).built(), expected < -1)


def test_the_causal_mask_is_not_built_until_its_cells_are_needed() -> None:
    mask = build_lazy_mask(**SHAPE)
    assert mask.visible is None
    assert mask[:, :, :, :6] is mask
    assert (mask.dim(), mask.size(-1), mask.dtype) == (4, 6, torch.float32)
    assert torch.equal(mask[:, 0, :, :2], mask.built()[:, 0, :, :2])
    assert torch.equal(mask.sum(-1), mask.built().sum(-1))
    assert torch.equal(torch.zeros(2, 1, 6, 6) + mask, mask.built().expand(2, 1, 6, 6))


def test_a_bias_that_the_mask_is_filled_into_stays_one_row() -> None:
    """As Falcon puts ALiBi into its mask."""
    bias = torch.arange(6.0).view(1, 1, 1, 6).expand(2, 4, 1, 6)
    mask = build_lazy_mask(**SHAPE)
    filled = torch.masked_fill(bias, mask < -1, LOWEST)
    assert isinstance(filled, LazyMask)
    assert filled.bias is bias
    assert torch.equal(filled.built(), torch.masked_fill(bias, mask.built() < -1, LOWEST))


@pytest.mark.parametrize("hides", [False, True], ids=["added to scores", "True hides"])
def test_a_change_of_dtype_is_that_of_the_matrix(hides: bool) -> None:
    expected = eager_mask(**SHAPE, dtype=torch.float32)
    mask = build_lazy_mask(**SHAPE, dtype=torch.float32)
    if hides:
        expected, mask = expected.bool(), mask.bool()
    for dtype in (torch.float64, torch.bool):
        converted = mask.to(dtype)
        cells = converted.built() if isinstance(converted, LazyMask) else converted
        assert cells.dtype == dtype
        if dtype.is_floating_point and not hides:
            # The lowest number of each dtype hides, so that a wider mask hides as much.
            assert torch.equal((cells < -1).expand_as(expected), expected < -1)
            assert float(cells.min()) == torch.finfo(dtype).min
        else:
            assert torch.equal(cells.expand_as(expected), expected.to(dtype))
    assert isinstance(mask.to("cpu"), LazyMask), "a mask without a new dtype is not built"


def test_a_comparison_with_a_number_that_does_not_divide_the_mask_is_that_of_the_matrix() -> None:
    expected = eager_mask(**SHAPE, dtype=torch.float32)
    mask = build_lazy_mask(**SHAPE, dtype=torch.float32)
    for bound in (1.0, LOWEST, float("-inf"), torch.tensor(-1.0)):
        compared = mask < bound
        assert not isinstance(compared, LazyMask)
        assert torch.equal(compared.expand_as(expected), expected < bound)
