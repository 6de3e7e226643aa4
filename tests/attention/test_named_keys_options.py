"""Named keys together with hidden ones, masks, biases, and scores that one kernel does not serve."""

from __future__ import annotations

import pytest
import torch

from phaselens import attention
from phaselens.errors import InputError
from tests.attention.reference import dense, largest_difference, random_qkv

N = 17
HIDDEN = torch.tensor([[3, 8], [5, -1]])


def mask_without(hidden: torch.Tensor) -> torch.Tensor:
    """A causal mask [batch, 1, N, N] that also hides these keys of each text."""
    mask = torch.ones(len(hidden), 1, N, N, dtype=torch.bool).tril()
    for text, keys in enumerate(hidden.tolist()):
        mask[text, :, :, [key for key in keys if key >= 0]] = False
    return mask


@pytest.mark.parametrize("has_mask", [False, True])
def test_named_keys_that_are_hidden_have_no_score(has_mask: bool) -> None:
    q, k, _ = random_qkv(N, group=2, dtype=torch.float64)
    options = {"mask": torch.ones(1, 1, N, N, dtype=torch.bool).tril()} if has_mask else {}
    keys = torch.tensor([[0, 3, 5, 8], [0, 3, 5, -1]])
    scores = attention.key_scores(q, k, keys, scale=0.6, hidden_keys=HIDDEN, **options)
    expected = dense(q, k, scale=0.6, mask=mask_without(HIDDEN)).scores
    for text in range(2):
        listed = keys[text][keys[text] >= 0]
        assert largest_difference(scores[text, ..., : len(listed)], expected[text][..., listed]) < 1e-12
    assert (scores[1, ..., 3] == -torch.inf).all()


def test_one_list_of_named_keys_joins_each_texts_hidden_ones() -> None:
    q, k, v = random_qkv(N, group=2, dtype=torch.float64)
    named = torch.tensor([[0, 9]])
    remainder = attention.attend_without(q, k, v, named, scale=0.6, hidden_keys=HIDDEN)
    hidden_and_named = torch.cat([HIDDEN, named.expand(2, -1)], -1)
    expected = dense(q, k, v, scale=0.6, mask=mask_without(hidden_and_named))
    sees_some = expected.lse.isfinite()
    assert largest_difference(remainder.lse, expected.lse) < 1e-12
    assert largest_difference(remainder.out[sees_some], expected.out[sees_some]) < 1e-12
    shared = attention.attend_without(q, k, v, named, scale=0.6, hidden_keys=torch.tensor([[3, 5]]))
    shared_keys = torch.tensor([[0, 3, 5, 9]]).expand(2, -1)
    assert largest_difference(shared.lse, dense(q, k, scale=0.6, mask=mask_without(shared_keys)).lse) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_additive_mask_and_a_bias_add_up(dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(N, group=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    mask = torch.randn(2, 1, N, N, generator=generator).masked_fill(~mask_without(HIDDEN), -torch.inf)
    bias = torch.randn(1, 4, N, N, generator=generator)
    keys = torch.tensor([[0, 3, 7, 16]]).expand(2, -1)
    scores = attention.key_scores(q, k, keys, scale=0.6, mask=mask, bias=bias)
    expected = dense(q, k, scale=0.6, mask=mask, bias=bias).scores[..., keys[0]]
    assert largest_difference(scores, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_in_half_precision_are_read_in_float32(dtype: torch.dtype) -> None:
    """The head that is computed again in float64 keeps what its dtype would round; the output is that of the model."""
    q, k, v = random_qkv(N, group=2, dtype=dtype)
    q[0, 1] *= 300
    keys = torch.tensor([[0]])
    remainder = attention.attend_without(q, k, v, keys, scale=0.6)
    first_key = torch.tensor([[0], [0]])
    expected = dense(q, k, v, scale=0.6, mask=mask_without(first_key))
    sees_some = expected.lse[0, 1].isfinite()
    assert remainder.out.dtype == torch.float32
    assert largest_difference(remainder.out[0, 1, sees_some], expected.out[0, 1, sees_some]) < 1e-6
    attended, _ = attention.attend(q, k, v, scale=0.6)
    scores = attention.key_scores(q, k, keys, scale=0.6)
    edited = scores.clone()
    edited[:, :, 1:] -= 2.0
    assert attention.reweighted(attended, remainder, v, keys, scores, edited).dtype == dtype


def test_each_text_has_keys_of_its_own() -> None:
    q, k, v = random_qkv(N, batch=3, group=2, dtype=torch.float64)
    keys = torch.tensor([[0], [4], [-1]])
    attended, _ = attention.attend(q, k, v, scale=0.6)
    scores = attention.key_scores(q, k, keys, scale=0.6)
    remainder = attention.attend_without(q, k, v, keys, scale=0.6)
    edited = scores.clone()
    edited[..., 5:, :] = -torch.inf
    out = attention.reweighted(attended, remainder, v, keys, scores, edited)
    mask = torch.ones(3, 1, N, N, dtype=torch.bool).tril()
    mask[0, :, 5:, 0] = mask[1, :, 5:, 4] = False
    assert largest_difference(out, dense(q, k, v, scale=0.6, mask=mask).out) < 1e-12


def test_keys_of_another_number_of_texts_are_refused() -> None:
    q, k, v = random_qkv(5, batch=3)
    keys = torch.tensor([[0]])
    attended, _ = attention.attend(q, k, v, scale=1.0)
    remainder = attention.attend_without(q, k, v, keys, scale=1.0)
    scores = attention.key_scores(q, k, keys, scale=1.0)
    with pytest.raises(InputError, match=r"expected keys \[batch \| 1, n\]"):
        attention.reweighted(attended, remainder, v, torch.tensor([[0], [0]]), scores, scores)
