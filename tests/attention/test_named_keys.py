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


NAMED_OPTIONS = {
    **OPTIONS,
    "mask by head": {"mask": (torch.rand(2, 4, N, N, generator=torch.Generator().manual_seed(4)) < 0.7)},
    "bias by key": {"bias": 3 * torch.randn(1, 4, 1, N, generator=torch.Generator().manual_seed(5))},
    "bias by query": {
        "bias": 3 * torch.randn(2, 1, N, N, generator=torch.Generator().manual_seed(6)),
        "sink_logits": torch.tensor([0.5, -1.0, 4.0, 0.0]),
    },
}
LISTED_KEYS = torch.tensor([[0, 9, -1, N - 1, 7], [3, -1, 0, N, 11]])


@pytest.mark.parametrize("n_queries", [N, 5])
@pytest.mark.parametrize("name", NAMED_OPTIONS)
def test_scores_of_named_keys_are_those_of_the_matrix(name: str, n_queries: int) -> None:
    q, k, _ = random_qkv(N, group=2, dtype=torch.float64)
    q = q[:, :, -n_queries:]
    options = {"scale": 0.6, **NAMED_OPTIONS[name]}
    if "mask" in options:
        options["mask"] = options["mask"][:, :, -n_queries:]
    if "bias" in options and options["bias"].shape[2] > 1:
        options["bias"] = options["bias"][:, :, -n_queries:]
    expected = dense(q, k, **options).scores
    scores = attention.key_scores(q, k, LISTED_KEYS, **options)
    assert scores.dtype == torch.float64
    for text, text_keys in enumerate(LISTED_KEYS.tolist()):
        for index, key in enumerate(text_keys):
            column = expected[text, :, :, key] if 0 <= key < N else torch.full((4, n_queries), -torch.inf)
            assert largest_difference(scores[text, :, :, index], column.double()) < 1e-12
    for_all = attention.key_scores(q, k, LISTED_KEYS[:1], **options)
    assert torch.equal(for_all[0], scores[0])
    assert largest_difference(for_all[1, ..., 1], expected[1, ..., 9]) < 1e-12


@pytest.mark.parametrize("name", NAMED_OPTIONS)
def test_attention_without_named_keys_is_that_with_hidden_ones(name: str) -> None:
    q, k, v = random_qkv(N, group=2, d_v=5, dtype=torch.float64)
    options = {"scale": 0.6, **NAMED_OPTIONS[name]}
    hidden = torch.tensor([[2], [5]])
    rest = attention.attend_without(q, k, v, LISTED_KEYS, hidden_keys=hidden, **options)
    mask = options.pop("mask", torch.ones(1, 1, N, N, dtype=torch.bool).tril())
    visible = mask if mask.dtype == torch.bool else mask > -torch.inf
    if "window" in options:
        visible = visible.triu(1 - options.pop("window"))
    visible = visible.expand(2, *visible.shape[1:]).clone()
    for text, text_keys in enumerate(torch.cat([LISTED_KEYS, hidden], -1).tolist()):
        visible[text, :, :, [key for key in text_keys if 0 <= key < N]] = False
    added = visible if mask.dtype == torch.bool else mask.double().masked_fill(~visible, -torch.inf)
    expected = dense(q, k, v, mask=added, **options)
    assert rest.lse.dtype == torch.float64
    # Additive masks are in float32.
    assert largest_difference(rest.lse, expected.lse) < 1e-12
    assert largest_difference(rest.out, expected.out) < 1e-12


@pytest.mark.parametrize("name", NAMED_OPTIONS)
def test_one_part_of_the_softmax_is_that_of_the_whole(name: str) -> None:
    """Named keys and what remains make the whole attention, whatever is hidden or added."""
    q, k, v = random_qkv(N, group=2, d_v=5, dtype=torch.float64)
    options = {"scale": 0.6, **NAMED_OPTIONS[name]}
    expected = dense(q, k, v, **options)
    scores = attention.key_scores(q, k, LISTED_KEYS, **options)
    rest = attention.attend_without(q, k, v, LISTED_KEYS, **options)
    assert largest_difference(rest.output(v, LISTED_KEYS, scores), expected.out) < 1e-12
    weights = rest.weights(scores)
    for text, text_keys in enumerate(LISTED_KEYS.tolist()):
        for index, key in enumerate(text_keys):
            column = expected.pattern[text, :, :, key] if 0 <= key < N else torch.zeros(4, N)
            assert largest_difference(weights[text, :, :, index], column.double()) < 1e-12


def test_a_row_without_any_attention_has_none_on_named_keys() -> None:
    rest = attention.Remainder(torch.zeros(1, 1, 2, 3), torch.tensor([[[-torch.inf, 0.0]]]))
    scores = torch.full((1, 1, 2, 2), -torch.inf)
    v = torch.ones(1, 1, 4, 3)
    assert rest.weights(scores).tolist() == [[[[0.0, 0.0]] * 2]]
    assert not rest.output(v, torch.tensor([[0, 1]]), scores).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_is_changed_if_its_weights_differ_at_the_precision_of_its_output(dtype: torch.dtype) -> None:
    rest = attention.Remainder(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, dtype=torch.float64))
    scores = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    edited = scores.clone()
    edited[0, 0, 1, 1], edited[0, 0, 2, 0] = 1e-10, 1e-3
    changed = attention.rows_changed(rest, scores, edited, dtype)
    assert changed.tolist() == [[[False, dtype == torch.float64, True]]]


def test_the_text_head_and_query_without_attention_are_named() -> None:
    lse = torch.zeros(2, 3, 4)
    lse[1, 2, 3] = -torch.inf
    rest = attention.Remainder(torch.zeros(2, 3, 4, 2), lse)
    scores = torch.zeros(2, 3, 4, 2)
    edited = torch.full_like(scores, -torch.inf)
    with pytest.raises(
        InputError, match=r"^head 2 attends to nothing .* query 3 of text 1: .* out of the edit$"
    ):
        attention.rows_changed(rest, scores, edited, torch.float32)
    edited[1, 2, 3, 1] = 0.0  # it still attends to the other named key
    assert attention.rows_changed(rest, scores, edited, torch.float32).all()
    unchanged = torch.full_like(scores, -torch.inf)
    assert not attention.rows_changed(rest, unchanged, unchanged, torch.float32).any()


def test_arguments_made_by_other_functions_are_named_with_their_origin() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    rest = attention.Remainder(zero, zero[0])
    with pytest.raises(
        InputError, match=r"^expected rest as a Remainder made by attend_without, received 3$"
    ):
        attention.rows_changed(3, zero, zero, torch.float32)
    with pytest.raises(
        InputError, match=r"^expected dtype as a dtype such as torch.float32, received 'float32'$"
    ):
        attention.rows_changed(rest, zero, zero, "float32")
