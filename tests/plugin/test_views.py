"""What a metric is handed, and the gathering of numbers by text."""

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
    gathered = PerText()
    for each in views:
        gathered.add(each, score=each["attn.hook_sink"] + 100 * (each.index or 0))
    return gathered


def test_real_marks_tokens_and_not_pads() -> None:
    assert batch(2, 0).real.tolist() == [[True, True, True], [True, False, False]]


def test_texts_come_back_in_the_order_of_the_run_whatever_the_batches() -> None:
    gathered = filled(view(0, 2, 0), view(1, 2, 0), view(0, 1), view(1, 1))
    assert gathered.texts == ["t0", "t1", "t2"]
    assert gathered.lengths == [1, 2, 3]
    assert gathered.stack("score").tolist() == [[0, 100], [1, 101], [2, 102]]


def test_the_order_by_content_is_that_of_the_hashes() -> None:
    assert filled(view(0, 2, 0), view(0, 1)).by_content == [2, 1, 0]


def test_a_layer_that_a_text_has_no_value_for_is_nan() -> None:
    stacked = filled(view(0, 0), view(1, 0), view(0, 1)).stack("score")
    assert np.isnan(stacked).tolist() == [[False, False], [False, True]]


def test_merging_is_the_same_in_either_order_and_after_pickling() -> None:
    halves = [filled(view(0, 0, 1)), filled(view(0, 3, 2))]
    whole = filled(view(0, 0, 1), view(0, 3, 2)).stack("score")
    for first, second in (halves, halves[::-1]):
        merged = pickle.loads(pickle.dumps(first))  # noqa: S301 - our own bytes
        merged.merge(second)
        assert np.array_equal(merged.stack("score"), whole)


def test_what_is_gathered_is_a_copy() -> None:
    values = torch.tensor([1.0])
    gathered = PerText()
    gathered.add(view(0, 0), score=values)
    values.fill_(9)
    assert gathered.stack("score").tolist() == [[1.0]]


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="score has 3 rows for a batch of 2 texts"):
        PerText().add(view(0, 0, 1), score=torch.zeros(3))


def test_float64_keeps_the_value() -> None:
    tensor = view(0, 3).float64("attn.hook_sink")
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == [3.0]
