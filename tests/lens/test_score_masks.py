"""What hides keys in a module that makes its own masks is measured: all keys before a query, or a window of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phaselens.errors import RefusedModel
from phaselens.lens.lazy_masks import LazyMask
from phaselens.lens.lazy_scores import ScoreTerms
from phaselens.lens.masks import recording
from phaselens.lens.score_masks import MaskReader

POSITION = torch.arange(32)
DISTANCE = POSITION[:, None] - POSITION


def terms(n_queries: int, n_keys: int, *masks: object, added: list[torch.Tensor] | None = None) -> ScoreTerms:
    query, key = torch.zeros(1, 2, n_queries, 4), torch.zeros(1, 2, n_keys, 4)
    return ScoreTerms(query, key, masks=list(masks), added=added or [])


def buffer(window: int | None) -> torch.Tensor:
    """The square mask of the longest text, as GPT-Neo keeps it."""
    visible = (DISTANCE >= 0) & ((window or 32) > DISTANCE)
    return visible[None, None]


def test_a_part_of_a_causal_buffer_needs_no_mask() -> None:
    reader, visible = MaskReader("Attention"), buffer(None)
    assert reader.read(nn.Module(), terms(5, 5, visible[:, :, :5, :5])) == (None, None)
    assert reader.read(nn.Module(), terms(1, 9, visible[:, :, 8:9, :9])) == (None, None)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(9, 9), (3, 9), (1, 9)])
def test_a_window_is_read_off_the_buffer_and_applied_to_long_texts(n_queries: int, n_keys: int) -> None:
    reader, visible = MaskReader("Attention"), buffer(4)
    part = visible[:, :, n_keys - n_queries : n_keys, :n_keys]
    mask, _ = reader.read(nn.Module(), terms(n_queries, n_keys, part))
    assert mask is not None
    assert torch.equal(mask, part)
    assert reader.read(nn.Module(), terms(3, 3, visible[:, :, :3, :3])) == (None, None)


def test_the_rule_of_a_window_holds_beyond_the_buffer() -> None:
    module, visible = nn.Module(), buffer(4)
    with recording() as recorder:
        MaskReader("Attention").read(module, terms(4, 4, visible[:, :, :4, :4]))
        rule = recorder.rule(module)
    assert rule is not None
    query, key = torch.tensor([10**6]), 10**6 - torch.arange(6)
    assert rule(query, key).tolist() == [True, True, True, True, False, False]


def test_a_module_without_a_mask_is_refused() -> None:
    with pytest.raises(RefusedModel, match="Attention attends in both directions"):
        MaskReader("Attention").read(nn.Module(), terms(5, 5))
    assert MaskReader("Attention").read(nn.Module(), terms(1, 5)) == (None, None)


def test_a_mask_that_is_no_band_is_kept_and_has_no_rule() -> None:
    module = nn.Module()
    visible = buffer(None)[:, :, :6, :6].clone()
    visible[..., 4:, 1] = False
    with recording() as recorder:
        mask, _ = MaskReader("Attention").read(module, terms(6, 6, visible))
        assert recorder.rule(module) is None
    assert mask is not None
    assert torch.equal(mask, visible)


def test_a_band_that_narrows_in_a_longer_text_is_refused() -> None:
    reader = MaskReader("Attention")
    reader.read(nn.Module(), terms(3, 3, buffer(4)[:, :, :3, :3].clone()))
    with pytest.raises(RefusedModel, match="hides other keys in a text of 9 tokens than in a short one"):
        reader.read(nn.Module(), terms(9, 9, buffer(4)[:, :, :9, :9].clone()))


def test_biases_are_summed_and_matrices_become_the_mask() -> None:
    causal = LazyMask(torch.Size((1, 1, 4, 4)), torch.float32, torch.device("cpu"), None)
    row, matrix = torch.arange(4.0).view(1, 1, 1, 4), torch.arange(16.0).view(1, 1, 4, 4)
    mask, bias = MaskReader("Attention").read(nn.Module(), terms(4, 4, causal, added=[row, row]))
    assert mask is None
    assert bias is not None
    assert torch.equal(bias, 2 * row)
    mask, bias = MaskReader("Attention").read(nn.Module(), terms(4, 4, causal, added=[matrix]))
    assert bias is None
    assert mask is not None
    assert torch.equal(mask, matrix.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf))
