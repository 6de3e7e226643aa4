"""The input of a metric, and values collected by text."""

import pickle

import numpy as np
import pytest
import torch

from phaselens.plugin import Batch, LayerView, PerText


def batch(*indices: int) -> Batch:
    lengths = tuple(index + 1 for index in indices)
    tokens = torch.zeros(len(indices), max(lengths), dtype=torch.long)
    names = tuple(f"t{index}" for index in indices)
    return Batch(names, indices, lengths, tokens, hashes=tuple(f"hash {9 - index}" for index in indices))


def view(layer: int | None, *indices: int) -> LayerView:
    values = torch.tensor(indices, dtype=torch.float32)
    return LayerView(layer, batch(*indices), {"attn.hook_sink": values})


def filled(*views: LayerView) -> PerText:
    collected = PerText()
    for layer_view in views:
        collected.add(layer_view, score=layer_view["attn.hook_sink"] + 100 * (layer_view.index or 0))
    return collected


def test_real_marks_tokens_and_not_pads() -> None:
    assert batch(2, 0).real.tolist() == [[True, True, True], [True, False, False]]


def test_texts_are_returned_in_the_order_of_the_run_for_any_batches() -> None:
    collected = filled(view(0, 2, 0), view(1, 2, 0), view(0, 1), view(1, 1))
    assert collected.texts == ["t0", "t1", "t2"]
    assert collected.lengths == [1, 2, 3]
    assert collected.stack("score").tolist() == [[0, 100], [1, 101], [2, 102]]


def test_the_order_by_content_is_that_of_the_hashes() -> None:
    assert filled(view(0, 2, 0), view(0, 1)).by_content == [2, 1, 0]


def test_a_missing_value_is_nan() -> None:
    stacked = filled(view(0, 0), view(1, 0), view(0, 1)).stack("score")
    assert np.isnan(stacked).tolist() == [[False, False], [False, True]]


def test_merging_is_the_same_in_either_order_and_after_pickling() -> None:
    halves = [filled(view(0, 0, 1)), filled(view(0, 3, 2))]
    expected = filled(view(0, 0, 1), view(0, 3, 2)).stack("score")
    for first, second in (halves, halves[::-1]):
        merged = pickle.loads(pickle.dumps(first))  # noqa: S301 - our own bytes
        merged.merge(second)
        assert np.array_equal(merged.stack("score"), expected)


def test_collected_values_are_copies() -> None:
    values = torch.tensor([1.0])
    collected = PerText()
    collected.add(view(0, 0), score=values)
    values.fill_(9)
    assert collected.stack("score").tolist() == [[1.0]]


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="score has 3 rows for a batch of 2 texts"):
        PerText().add(view(0, 0, 1), score=torch.zeros(3))


def test_float64_keeps_the_value() -> None:
    tensor = view(0, 3).float64("attn.hook_sink")
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == [3.0]


def test_the_order_is_read_again_only_after_a_change() -> None:
    values = filled(view(0, 1, 0))
    assert values.texts is values.texts
    assert (values.lengths, values.by_content) == (values.lengths, values.by_content)
    values.merge(filled(view(0, 3, 2)))
    assert len(values.texts) == len(values.lengths) == len(values.by_content) == 4
