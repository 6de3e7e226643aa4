"""Moments of cells over texts, and folds of texts."""

from __future__ import annotations

import numpy as np
import pytest

from phaselens_plugins._cells import CellMoments, Folds


def moments(n: int) -> CellMoments:
    moments = CellMoments()
    for index in range(n):
        text = f"{index:02d}"
        moments.squares[text] = {(0, "q"): np.full((1, 2), 10.0**index)}
        moments.sums[text] = {(0, "q"): np.full((1, 2), 10.0**index)}
        moments.n_tokens[text] = 2
    return moments


@pytest.mark.parametrize("n", [2, 3, 4])
def test_cells_of_a_fold_are_selected_outside_of_it(n: int) -> None:
    text_moments = moments(5)
    folds = Folds.split(text_moments, n)
    assert folds is not None
    assert folds.n == n
    for text, fold in folds.fold_of.items():
        assert text not in folds.selection_texts[fold]
        assert set(folds.selection_texts[fold]) == {
            other_text for other_text in folds.fold_of if folds.fold_of[other_text] != fold
        }
    assert len(folds.selection_texts[-1]) == 5
    assert sorted(text for fold in range(n) for text in folds.members(fold)) == sorted(folds.fold_of)


def test_there_are_at_most_as_many_folds_as_texts() -> None:
    folds = Folds.split(moments(3), 9)
    assert folds is not None
    assert folds.n == 3
    assert Folds.split(moments(1), 2) is None


def test_a_mean_weighs_tokens_and_not_texts() -> None:
    text_moments = moments(2)
    text_moments.n_tokens["00"] = 8
    assert text_moments.mean(["00", "01"], (0, "q")).tolist() == [[1.1, 1.1]]
    assert text_moments.sum_of_squares(["00", "01"], (0, "q")).tolist() == [[11.0, 11.0]]
