"""Other scores for named keys against a dense float64 softmax in which the same cells are changed."""

from __future__ import annotations

import math

import pytest
import torch

from phaselens import attention
from phaselens.errors import InputError
from tests.attention.reference import dense, largest_difference, random_qkv

SHIFTS = (-math.inf, -4.0, -1.0, 0.0, 2.0)
N = 23


def additive_mask() -> torch.Tensor:
    """A causal mask with biases by distance, of two texts that differ."""
    distance = torch.arange(N)[:, None] - torch.arange(N)
    bias = -0.1 * distance.float() * torch.tensor([1.0, 2.0])[:, None, None]
    return bias.masked_fill(distance < 0, -torch.inf)[:, None]


OPTIONS = {
    "causal": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sink logits": {"sink_logits": torch.tensor([0.5, -1.0, 4.0, 0.0])},
    "all together": {"window": 7, "softcap": 3.0, "sink_logits": torch.tensor([0.5, -1.0, 4.0, 0.0])},
    "bool mask": {"mask": torch.ones(N, N, dtype=torch.bool).tril()[None, None]},
    "additive mask": {"mask": additive_mask()},
}
KEYS = {
    "key 0": torch.tensor([[0]]),
    "key 7": torch.tensor([[7]]),
    "one per text": torch.tensor([[3], [11]]),
    "two keys": torch.tensor([[0, 9]]),
    "none in one text": torch.tensor([[2, -1], [-1, -1]]),
}


def changed_cells(scores: torch.Tensor, keys: torch.Tensor, shift: float) -> torch.Tensor:
    """Add `shift` to the dense scores [batch, head, query, key] of the keys, for the queries after each key."""
    scores = scores.clone()
    for text, text_keys in enumerate(keys.expand(len(scores), -1).tolist()):
        for key in text_keys:
            if key >= 0:
                scores[text, :, key + 1 :, key] += shift
    return scores


def reference(q, k, v, keys, shift, **options):
    """The output with shifted scores, in float64, from the whole matrix."""
    sink_logits = options.pop("sink_logits", None)
    scores = changed_cells(dense(q, k, v, **options).scores, keys, shift)
    if sink_logits is not None:
        column = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return weights @ values


def shifted(q, k, v, keys, shifts=SHIFTS, **options):
    """The output for every shift, from one call without the keys."""
    own, _ = attention.attend(q, k, v, **options)
    scores = attention.key_scores(q, k, keys, **options)
    rest = attention.attend_without(q, k, v, keys, **options)
    after = torch.arange(q.shape[2])[:, None] > keys.expand(len(q), -1)[:, None, None, :]
    return [
        attention.reweighted(own, rest, v, keys, scores, torch.where(after, scores + shift, scores))
        for shift in shifts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_shift_equals_the_dense_softmax(options, keys, dtype) -> None:
    q, k, v = random_qkv(N, group=2, d=8, dtype=dtype)
    options = {"scale": 0.6, **options}
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for shift, out in zip(SHIFTS, shifted(q, k, v, keys, **options), strict=True):
        assert out.dtype == dtype
        assert largest_difference(out, reference(q, k, v, keys, shift, **options)) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_output(dtype) -> None:
    q, k, v = random_qkv(N, group=2, dtype=dtype)
    for shift, out in zip(SHIFTS, shifted(q, k, v, KEYS["key 0"], scale=0.6), strict=True):
        expected = reference(q, k, v, KEYS["key 0"], shift, scale=0.6)
        assert largest_difference(out, expected) < 4 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_a_shift_of_zero_keeps_every_bit_and_its_formula_agrees() -> None:
    q, k, v = random_qkv(N, group=2)
    keys = KEYS["two keys"]
    own, _ = attention.attend(q, k, v, scale=0.6)
    (kept,) = shifted(q, k, v, keys, [0.0], scale=0.6)
    assert torch.equal(kept, own)
    rest = attention.attend_without(q, k, v, keys, scale=0.6)
    by_formula = rest.output(v, keys, attention.key_scores(q, k, keys, scale=0.6))
    assert largest_difference(by_formula, own) < 1e-6


def test_a_uniform_head_without_the_key_reads_the_mean_of_the_other_values() -> None:
    q, _, v = random_qkv(9, kv_heads=1, d=4, dtype=torch.float64)
    (out,) = shifted(q * 0, q * 0, v, torch.tensor([[0]]), [-math.inf], scale=1.0)
    counts = torch.arange(1, 9)[:, None]
    assert largest_difference(out[:, :, 1:], v[:, :, 1:].cumsum(2) / counts) < 1e-12
    assert torch.equal(out[:, :, :1], v[:, :, :1])


def test_a_key_with_almost_all_attention_leaves_the_other_keys_exact() -> None:
    """At 1 − p = 1e-9 the quotient (o − p·v) / (1 − p) has no digit left in float32."""
    q, k, v = random_qkv(N, kv_heads=1, d=4)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 0, 0] = 24.0
    (out,) = shifted(q, k, v, torch.tensor([[0]]), [-math.inf], scale=1.0)
    assert largest_difference(out, reference(q, k, v, torch.tensor([[0]]), -math.inf, scale=1.0)) < 2e-6


def test_scores_beyond_float32_are_computed_in_float64() -> None:
    q, k, v = random_qkv(N, group=2)
    q, k = q * 40, k * 40
    own, _ = attention.attend(q, k, v, scale=1.0)
    n_changed = 0
    for shift, out in zip(SHIFTS, shifted(q, k, v, KEYS["key 0"], scale=1.0), strict=True):
        expected = reference(q, k, v, KEYS["key 0"], shift, scale=1.0)
        is_changed = (out != own).any(-1)  # other rows keep the kernel's rounding
        n_changed += int(is_changed.sum())
        assert (out - expected)[is_changed].abs().sum() < 2e-6 * max(1, int(is_changed.sum()))
    assert n_changed > 20


def test_a_key_without_attention_leaves_every_bit() -> None:
    q, k, v = random_qkv(N, kv_heads=1, d=4)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 0, 0] = -1e5
    own, _ = attention.attend(q, k, v, scale=1.0)
    assert all(torch.equal(out, own) for out in shifted(q, k, v, torch.tensor([[0]]), scale=1.0))


def test_a_row_with_nothing_but_the_key_is_refused_by_name() -> None:
    q, k, v = random_qkv(4, kv_heads=1, d=4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2, 1:] = False
    with pytest.raises(
        InputError, match="head 0 attends to nothing but the edited keys at query 2 of text 0"
    ):
        shifted(q, k, v, torch.tensor([[0]]), [-math.inf], scale=1.0, mask=mask[None, None])
    (out,) = shifted(q, k, v, torch.tensor([[0]]), [-4.0], scale=1.0, mask=mask[None, None])
    assert torch.equal(out[:, :, 2], attention.attend(q, k, v, scale=1.0, mask=mask[None, None])[0][:, :, 2])


def test_hidden_keys_are_hidden_from_every_statistic() -> None:
    q, k, v = random_qkv(N, group=2, dtype=torch.float64)
    keys = torch.tensor([[4, 9], [0, -1]])
    mask = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    for text, text_keys in enumerate(keys.tolist()):
        mask[text, :, :, [key for key in text_keys if key >= 0]] = False
    expected = dense(q, k, v, scale=0.6, mask=mask)
    out, lse = attention.attend(q, k, v, scale=0.6, hidden_keys=keys)
    assert largest_difference(out, expected.out) < 1e-12
    received = attention.received_mass(q, k, lse, scale=0.6, hidden_keys=keys)
    assert largest_difference(received, expected.received) < 1e-12
    assert float(received[0, :, 9].abs().max()) == 0.0
    sink = attention.sink_mass(q, k, lse, 4, scale=0.6, hidden_keys=keys)
    assert largest_difference(sink, expected.pattern[..., 4]) < 1e-12


@pytest.mark.parametrize(
    "keys", [[0], torch.tensor([0]), torch.tensor([[0.5]]), torch.tensor([[0], [1], [2]])]
)
def test_keys_that_are_no_indices_by_text_are_refused(keys) -> None:
    q, k, _ = random_qkv(5)
    with pytest.raises(InputError, match=r"expected keys \[batch \| 1, n\]"):
        attention.key_scores(q, k, keys, scale=1.0)
