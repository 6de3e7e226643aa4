"""Every statistic against the dense float64 answer, for all that can shape a softmax."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens import attention
from phaselens.attention import _kernels, _strips
from tests.attention.reference import dense, random_qkv, worst

TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(q, k, v, tolerance, lse_tolerance=None, **options):
    """All of one problem: out, lse, sink, entropy, received, distance, window; alone and in one pass."""
    want = dense(q, k, v, **options)
    out, lse = attention.attend(q, k, v, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert worst(out, want.out) < max(tolerance, 4 * torch.finfo(q.dtype).eps * float(want.out.abs().amax()))
    relative = (lse - want.lse) / want.lse.abs().clamp(min=1.0)
    assert worst(relative.masked_fill(want.lse == lse, 0.0), torch.zeros_like(want.lse)) < (
        lse_tolerance or tolerance
    )
    n_queries, n_keys = want.pattern.shape[-2:]
    for position in {0, n_keys // 2, n_keys - 1}:
        sink = attention.sink_mass(q, k, lse, position, **options)
        assert worst(sink, want.pattern[..., position]) < (lse_tolerance or tolerance)
    assert worst(attention.row_entropy(q, k, lse, **options), want.entropy) < tolerance
    assert worst(attention.received_mass(q, k, lse, **options), want.received) < tolerance
    at_once = attention.summarise(
        q, k, lse, position=0, entropy=True, received=True, distances=k.shape[2], **options
    )
    assert worst(at_once.sink, want.pattern[..., 0]) < tolerance
    assert worst(at_once.entropy, want.entropy) < tolerance
    assert worst(at_once.received, want.received) < tolerance
    query = torch.arange(n_keys - n_queries, n_keys)[:, None]
    key = torch.arange(n_keys)[None, :]
    if options.get("mask") is None:
        for distance in range(n_keys):
            mass = (want.pattern * (query - key == distance)).sum((-2, -1))
            assert worst(at_once.distance[..., distance], mass) < tolerance
    for longest in (1, 4, n_keys + 2):
        some = attention.distance_mass(q, k, lse, longest=longest, **options)
        assert some.shape[-1] == longest
        shared = min(longest, n_keys)
        # A sum over queries, each of which may miss by what the log-sum-exp misses.
        limit = lse_tolerance * n_queries if lse_tolerance else tolerance
        assert worst(some[..., :shared], at_once.distance[..., :shared]) < limit
        assert not some[..., shared:].any()
    near = (key < query) & (key >= query - 3) & (key > 0)
    window = attention.window_mass(q, k, lse, 3, **options)
    assert worst(window, (want.pattern * near).sum(-1)) < (lse_tolerance or tolerance)
    near = (key <= query) & (key >= query - 2)
    window = attention.window_mass(q, k, lse, 2, include_self=True, exclude_first=False, **options)
    assert worst(window, (want.pattern * near).sum(-1)) < (lse_tolerance or tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kv_heads", "group"), [(4, 1), (2, 3), (1, 4)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 7},
        {"window": 1000},
        {"softcap": 2.0},
        {"sinks": True},
        {"softcap": 1.5, "window": 5, "sinks": True},
    ],
    ids=["causal", "window", "window beyond the text", "softcap", "learned sinks", "all"],
)
def test_heads_windows_caps_and_learned_sinks(dtype, kv_heads, group, options):
    q, k, v = random_qkv(33, kv_heads=kv_heads, group=group, d_v=5, dtype=dtype)
    if "sinks" in options:
        options = options | {"sinks": torch.linspace(-1, 3, kv_heads * group, dtype=dtype)}
    check(q, k, v, TIGHT[dtype], scale=0.7, **options)


@pytest.mark.parametrize("n_queries", [1, 2, 5, 33])
@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_aligns_the_last_query_with_the_last_key(n_queries, window):
    q, k, v = random_qkv(n_queries, 33, group=2)
    check(q, k, v, 1e-5, scale=0.5, window=window)


def left_pad(batch, n, pads):
    real = torch.arange(n)[None, :] >= torch.tensor(pads)[:, None]
    return (torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, :])[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_padding_masks_and_rows_that_see_nothing(dtype, kind):
    q, k, v = random_qkv(20, group=2, dtype=dtype)
    mask = left_pad(2, 20, [0, 6])
    if kind != "bool":
        low = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    check(q, k, v, TIGHT[dtype], scale=0.7, mask=mask)
    out, lse = attention.attend(q, k, v, scale=0.7, mask=mask)
    assert (lse[1, :, :6] == -torch.inf).all()
    assert (out[1, :, :6] == 0).all()
    found = attention.summarise(q, k, lse, position=3, entropy=True, received=True, scale=0.7, mask=mask)
    assert (found.sink[1, :, :6] == 0).all()
    assert (found.entropy[1, :, :6] == 0).all()
    assert (found.received[1, :, :6] == 0).all()


def test_a_row_that_sees_nothing_gives_all_to_its_learned_sink():
    q, k, v = random_qkv(6)
    mask = left_pad(2, 6, [0, 6])
    sinks = torch.tensor([0.5, -2.0])
    check(q, k, v, 1e-5, scale=0.7, mask=mask, sinks=sinks)
    _, lse = attention.attend(q, k, v, scale=0.7, mask=mask, sinks=sinks)
    assert torch.equal(lse[1], sinks[:, None].expand(2, 6))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_masks_per_head_with_a_bias_and_a_window(softcap):
    q, k, v = random_qkv(21, group=2)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, 4, 21, 21, generator=generator)
    bias.masked_fill_(~left_pad(2, 21, [0, 2]), -torch.inf)
    check(q, k, v, 1e-5, scale=0.4, mask=bias, softcap=softcap)
    check(q, k, v, 1e-5, scale=0.4, mask=bias, softcap=softcap, window=6)
    check(
        q,
        k,
        v,
        1e-5,
        scale=0.4,
        mask=bias[:1, :1],
        softcap=softcap,
        sinks=torch.randn(4, generator=generator),
    )


def test_a_very_negative_but_finite_bias_is_a_bias():
    """Far below every score, but above a dtype's lowest: float32 would lose the scores beside it."""
    q, k, _ = random_qkv(12)
    bias = torch.full((1, 1, 12, 12), -1e9).triu(1)
    bias[..., 0] = -1e9
    want = dense(q, k, scale=0.4, mask=bias)
    _, lse = attention.attend(q, k, k, scale=0.4, mask=bias)
    found = attention.summarise(q, k, lse, position=5, entropy=True, received=True, scale=0.4, mask=bias)
    assert worst(attention.sink_mass(q, k, lse, 5, scale=0.4, mask=bias), want.pattern[..., 5]) < 1e-6
    assert worst(found.sink, want.pattern[..., 5]) < 1e-6
    assert worst(found.entropy, want.entropy) < 1e-6
    assert worst(found.received, want.received) < 1e-6


def test_more_queries_than_keys_need_a_mask_and_then_work():
    q, k, v = random_qkv(9, 4)
    mask = torch.rand(1, 1, 9, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    check(q, k, v, 1e-5, scale=0.4, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 4.0}])
def test_half_precision_is_summed_in_float32(dtype, options):
    """Entropy and received mass as exact as in float32; what uses the fused kernel's lse, within 1e-4 (CPU)."""
    q, k, v = random_qkv(40, group=2, d=16, dtype=dtype)
    check(q, k, v, 1e-5, 1e-4, scale=0.9, **options)


def test_layouts_that_are_not_contiguous_give_the_same():
    """As models hand them over: [batch, pos, head, d_head] transposed."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(17, group=2))
    assert not q.is_contiguous()
    check(q, k, v, 1e-5, scale=0.7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_any_block_size(data):
    draw = data.draw
    n_keys = draw(st.integers(1, 19), "keys")
    n_queries = draw(st.integers(1, n_keys), "queries")
    kv_heads, group = draw(st.integers(1, 3), "kv heads"), draw(st.integers(1, 3), "group")
    q, k, v = random_qkv(
        n_queries,
        n_keys,
        batch=draw(st.integers(1, 3), "batch"),
        kv_heads=kv_heads,
        group=group,
        d=draw(st.integers(1, 9), "d"),
        d_v=draw(st.integers(1, 9), "d_v"),
        dtype=torch.float64,
        seed=draw(st.integers(0, 9), "seed"),
    )
    options = {
        "scale": draw(st.floats(-2, 2), "scale"),
        "window": draw(st.none() | st.integers(1, 21), "window"),
        "softcap": draw(st.none() | st.floats(0.5, 30), "softcap"),
        "sinks": draw(st.none() | st.just(torch.randn(kv_heads * group, dtype=torch.float64)), "sinks"),
    }
    with (
        patch.object(_strips, "ROWS", draw(st.integers(1, 8), "rows of a strip")),
        patch.object(_strips, "CPU_ELEMENTS", draw(st.integers(1, 400), "elements")),
        patch.object(_kernels, "ROWS", draw(st.integers(1, 8), "rows of a call")),
    ):
        check(q, k, v, 1e-11, **options)


def test_pads_on_the_right_change_nothing():
    """Whatever stands in the pads, and whichever texts share the batch."""
    q, k, v = random_qkv(30, batch=3, group=2)
    lengths = torch.tensor([30, 11, 1])
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        for text, length in enumerate(lengths):
            x[text, :, length:] = 40.0 * torch.randn_like(x[text, :, length:])
    _, lse = attention.attend(*spoiled, scale=0.6)
    found = attention.summarise(
        spoiled[0],
        spoiled[1],
        lse,
        position=0,
        entropy=True,
        received=True,
        distances=q.shape[2],
        lengths=lengths,
        scale=0.6,
    )
    for text, length in enumerate(lengths.tolist()):
        alone = [x[text : text + 1, :, :length] for x in (q, k, v)]
        _, one = attention.attend(*alone, scale=0.6)
        want = attention.summarise(
            alone[0], alone[1], one, position=0, entropy=True, received=True, distances=length, scale=0.6
        )
        assert worst(lse[text, :, :length], one[0]) < 1e-6
        for name in ("sink", "entropy", "received", "distance"):
            part = getattr(found, name)[text]
            assert worst(part[:, :length], getattr(want, name)[0]) < 1e-6, name
            if name in ("received", "distance"):
                assert (part[:, length:] == 0).all()


def test_pads_that_are_nan_do_not_reach_real_tokens():
    q, k, _ = random_qkv(12, dtype=torch.float32)
    q[0, :, 7:], k[0, :, 7:] = torch.nan, torch.inf
    _, lse = attention.attend(q, k, k, scale=0.6)
    lengths = torch.tensor([7, 12])
    found = attention.summarise(
        q, k, lse, position=0, entropy=True, received=True, distances=q.shape[2], lengths=lengths, scale=0.6
    )
    want = dense(q[:, :, :7], k[:, :, :7], scale=0.6)
    assert worst(found.sink[0, :, :7], want.pattern[0, ..., 0]) < 1e-6
    assert worst(found.entropy[0, :, :7], want.entropy[0]) < 1e-6
    assert worst(found.received[0, :, :7], want.received[0]) < 1e-6
    assert found.entropy[0, :, 7:].isnan().all()
    assert not found.entropy[1].isnan().any()
    assert not found.received[1].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_bad_number_makes_nan_of_all_it_takes_part_in_and_of_nothing_else(value, dtype, where):
    q, k, _ = random_qkv(10, batch=2, group=2, dtype=dtype)
    (q if where == "query" else k)[0, 0, 4, 2] = value
    _, lse = attention.attend(q, k, k, scale=0.6)
    found = attention.summarise(q, k, lse, position=1, entropy=True, scale=0.6)
    alone = attention.sink_mass(q, k, lse, 1, scale=0.6)
    window = attention.window_mass(q, k, lse, 9, scale=0.6)
    touched = torch.zeros(2, 4, 10, dtype=torch.bool)
    if where == "query":
        touched[0, 0, 4] = True
    else:
        touched[0, :2, 4:] = True
    for name, each in {
        "entropy": found.entropy,
        "sink": found.sink,
        "sink alone": alone,
        "window": window,
    }.items():
        assert torch.equal(each.isnan(), touched), name


def test_identical_heads_in_any_batch_give_the_same_numbers_alone():
    q, k, v = random_qkv(25, batch=4, group=2)
    _, lse = attention.attend(q, k, v, scale=0.8)
    whole = attention.summarise(q, k, lse, position=0, entropy=True, received=True, scale=0.8)
    for text in range(4):
        part = slice(text, text + 1)
        _, one = attention.attend(q[part], k[part], v[part], scale=0.8)
        alone = attention.summarise(q[part], k[part], one, position=0, entropy=True, received=True, scale=0.8)
        for name in ("sink", "entropy", "received"):
            assert worst(getattr(whole, name)[part], getattr(alone, name)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_asked_for_beside_it_changes_no_bit_of_a_statistic(dtype):
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 4, 40, 16, generator=generator).to(dtype) for _ in range(2))
    _, lse = attention.attend(q, k, k, scale=0.25)
    asked = {"position": 1, "entropy": True, "received": True, "distances": 5, "refine": True}
    together = attention.summarise(q, k, lse, scale=0.25, **asked)
    names = {"position": "sink", "distances": "distance", "refine": "lse"}
    for option, value in asked.items():
        alone = attention.summarise(q, k, lse, scale=0.25, **{option: value})
        name = names.get(option, option)
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
