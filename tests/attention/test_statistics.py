"""Every statistic against the dense float64 reference, for every option of the softmax."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens import attention
from phaselens.attention import _kernels, _key_blocks
from tests.attention.reference import dense, largest_difference, random_qkv

TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_equals_dense(q, k, v, tolerance, lse_tolerance=None, **options):
    """Compare out, lse, sink, entropy, received, distance and window of one problem, one at a time and in one pass."""
    expected = dense(q, k, v, **options)
    out, lse = attention.attend(q, k, v, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert largest_difference(out, expected.out) < max(
        tolerance, 4 * torch.finfo(q.dtype).eps * float(expected.out.abs().amax())
    )
    relative = (lse - expected.lse) / expected.lse.abs().clamp(min=1.0)
    assert largest_difference(
        relative.masked_fill(expected.lse == lse, 0.0), torch.zeros_like(expected.lse)
    ) < (lse_tolerance or tolerance)
    n_queries, n_keys = expected.pattern.shape[-2:]
    for position in {0, n_keys // 2, n_keys - 1}:
        sink = attention.sink_mass(q, k, lse, position, **options)
        assert largest_difference(sink, expected.pattern[..., position]) < (lse_tolerance or tolerance)
    assert largest_difference(attention.row_entropy(q, k, lse, **options), expected.entropy) < tolerance
    assert largest_difference(attention.received_mass(q, k, lse, **options), expected.received) < tolerance
    statistics = attention.summarise(
        q, k, lse, position=0, itself=True, entropy=True, received=True, distances=k.shape[2], **options
    )
    own = expected.pattern.diagonal(n_keys - n_queries, dim1=-2, dim2=-1)
    own = torch.nn.functional.pad(own, (n_queries - own.shape[-1], 0))  # queries before the first key
    assert largest_difference(statistics.itself, own) < tolerance
    assert largest_difference(statistics.sink, expected.pattern[..., 0]) < tolerance
    assert largest_difference(statistics.entropy, expected.entropy) < tolerance
    assert largest_difference(statistics.received, expected.received) < tolerance
    query = torch.arange(n_keys - n_queries, n_keys)[:, None]
    key = torch.arange(n_keys)[None, :]
    if options.get("mask") is None:
        for distance in range(n_keys):
            mass = (expected.pattern * (query - key == distance)).sum((-2, -1))
            assert largest_difference(statistics.distance[..., distance], mass) < tolerance
    for longest in (1, 4, n_keys + 2):
        nearest_mass = attention.distance_mass(q, k, lse, longest=longest, **options)
        assert nearest_mass.shape[-1] == longest
        shared = min(longest, n_keys)
        # A sum over queries, each with the error of the log-sum-exp.
        limit = lse_tolerance * n_queries if lse_tolerance else tolerance
        assert largest_difference(nearest_mass[..., :shared], statistics.distance[..., :shared]) < limit
        assert not nearest_mass[..., shared:].any()
    in_window = (key < query) & (key >= query - 3) & (key > 0)
    window = attention.window_mass(q, k, lse, 3, **options)
    assert largest_difference(window, (expected.pattern * in_window).sum(-1)) < (lse_tolerance or tolerance)
    in_window = (key <= query) & (key >= query - 2)
    window = attention.window_mass(q, k, lse, 2, include_self=True, exclude_first=False, **options)
    assert largest_difference(window, (expected.pattern * in_window).sum(-1)) < (lse_tolerance or tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kv_heads", "group"), [(4, 1), (2, 3), (1, 4)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 7},
        {"window": 1000},
        {"softcap": 2.0},
        {"sink_logits": True},
        {"softcap": 1.5, "window": 5, "sink_logits": True},
    ],
    ids=["causal", "window", "window beyond the text", "softcap", "sink logits", "all"],
)
def test_heads_windows_caps_and_sink_logits_equal_dense(dtype, kv_heads, group, options):
    q, k, v = random_qkv(33, kv_heads=kv_heads, group=group, d_v=5, dtype=dtype)
    if "sink_logits" in options:
        options = options | {"sink_logits": torch.linspace(-1, 3, kv_heads * group, dtype=dtype)}
    assert_equals_dense(q, k, v, TIGHT[dtype], scale=0.7, **options)


@pytest.mark.parametrize("n_queries", [1, 2, 5, 33])
@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_aligns_the_last_query_with_the_last_key(n_queries, window):
    q, k, v = random_qkv(n_queries, 33, group=2)
    assert_equals_dense(q, k, v, 1e-5, scale=0.5, window=window)


def left_pad(batch, n, pads):
    real = torch.arange(n)[None, :] >= torch.tensor(pads)[:, None]
    return (torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, :])[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden_as", ["bool", "-inf", "lowest"])
def test_padding_masks_and_fully_masked_rows_equal_dense(dtype, hidden_as):
    q, k, v = random_qkv(20, group=2, dtype=dtype)
    mask = left_pad(2, 20, [0, 6])
    if hidden_as != "bool":
        low = -torch.inf if hidden_as == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    assert_equals_dense(q, k, v, TIGHT[dtype], scale=0.7, mask=mask)
    out, lse = attention.attend(q, k, v, scale=0.7, mask=mask)
    assert (lse[1, :, :6] == -torch.inf).all()
    assert (out[1, :, :6] == 0).all()
    statistics = attention.summarise(q, k, lse, position=3, entropy=True, received=True, scale=0.7, mask=mask)
    assert (statistics.sink[1, :, :6] == 0).all()
    assert (statistics.entropy[1, :, :6] == 0).all()
    assert (statistics.received[1, :, :6] == 0).all()


def test_a_fully_masked_row_gives_all_weight_to_its_sink_logit():
    q, k, v = random_qkv(6)
    mask = left_pad(2, 6, [0, 6])
    sink_logits = torch.tensor([0.5, -2.0])
    assert_equals_dense(q, k, v, 1e-5, scale=0.7, mask=mask, sink_logits=sink_logits)
    _, lse = attention.attend(q, k, v, scale=0.7, mask=mask, sink_logits=sink_logits)
    assert torch.equal(lse[1], sink_logits[:, None].expand(2, 6))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_biased_masks_per_head_equal_dense(softcap):
    q, k, v = random_qkv(21, group=2)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, 4, 21, 21, generator=generator)
    bias.masked_fill_(~left_pad(2, 21, [0, 2]), -torch.inf)
    assert_equals_dense(q, k, v, 1e-5, scale=0.4, mask=bias, softcap=softcap)
    assert_equals_dense(q, k, v, 1e-5, scale=0.4, mask=bias, softcap=softcap, window=6)
    assert_equals_dense(
        q,
        k,
        v,
        1e-5,
        scale=0.4,
        mask=bias[:1, :1],
        softcap=softcap,
        sink_logits=torch.randn(4, generator=generator),
    )


def test_a_very_negative_but_finite_bias_is_a_bias():
    """The bias is far below every score and above the dtype's minimum; float32 would lose the added scores."""
    q, k, _ = random_qkv(12)
    bias = torch.full((1, 1, 12, 12), -1e9).triu(1)
    bias[..., 0] = -1e9
    expected = dense(q, k, scale=0.4, mask=bias)
    _, lse = attention.attend(q, k, k, scale=0.4, mask=bias)
    statistics = attention.summarise(q, k, lse, position=5, entropy=True, received=True, scale=0.4, mask=bias)
    assert (
        largest_difference(attention.sink_mass(q, k, lse, 5, scale=0.4, mask=bias), expected.pattern[..., 5])
        < 1e-6
    )
    assert largest_difference(statistics.sink, expected.pattern[..., 5]) < 1e-6
    assert largest_difference(statistics.entropy, expected.entropy) < 1e-6
    assert largest_difference(statistics.received, expected.received) < 1e-6


def test_more_queries_than_keys_work_with_a_mask():
    q, k, v = random_qkv(9, 4)
    mask = torch.rand(1, 1, 9, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    assert_equals_dense(q, k, v, 1e-5, scale=0.4, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 4.0}])
def test_half_precision_is_summed_in_float32(dtype, options):
    """Entropy and received mass have float32 accuracy; values from the fused kernel's lse are within 1e-4 (CPU)."""
    q, k, v = random_qkv(40, group=2, d=16, dtype=dtype)
    assert_equals_dense(q, k, v, 1e-5, 1e-4, scale=0.9, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_masses_in_half_precision_do_not_have_the_kernels_error(dtype):
    """The CPU kernel's log-sum-exp is off by 6e-5; a mass on one key must not be."""
    q, k, v = random_qkv(40, group=2, d=16, dtype=dtype)
    expected = dense(q, k, v, scale=0.9)
    _, lse = attention.attend(q, k, v, scale=0.9)
    for position in (0, 20, 39):
        sink = attention.sink_mass(q, k, lse, position, scale=0.9)
        assert largest_difference(sink, expected.pattern[..., position]) < 2e-6
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 0] = False
    rest = attention.attend_without(q, k, v, torch.tensor([[0]]), scale=0.9)
    without = dense(q, k, v, scale=0.9, mask=mask)
    assert largest_difference(rest.lse, without.lse) < 5e-6


def test_vectors_that_are_spread_over_memory_equal_dense():
    """Keys and values as a convolution leaves them, [batch, d, pos]."""
    q, k, v = (states.transpose(-1, -2).contiguous().transpose(-1, -2) for states in random_qkv(40, group=2))
    assert k.stride(-1) == 40
    assert_equals_dense(q, k, v, TIGHT[torch.float32], scale=0.3)
    assert_equals_dense(q, k, v, TIGHT[torch.float32], scale=0.3, window=5)


def test_layouts_that_are_not_contiguous_equal_dense():
    """Models pass q, k, v as a transposed [batch, pos, head, d_head]."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(17, group=2))
    assert not q.is_contiguous()
    assert_equals_dense(q, k, v, 1e-5, scale=0.7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_block_size_equal_dense(data):
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
        "sink_logits": draw(
            st.none() | st.just(torch.randn(kv_heads * group, dtype=torch.float64)), "sink_logits"
        ),
    }
    with (
        patch.object(_key_blocks, "ROWS", draw(st.integers(1, 8), "rows of a block")),
        patch.object(_key_blocks, "CPU_ELEMENTS", draw(st.integers(1, 400), "elements")),
        patch.object(_kernels, "ROWS", draw(st.integers(1, 8), "rows of a call")),
    ):
        assert_equals_dense(q, k, v, 1e-11, **options)


def test_pads_on_the_right_have_no_effect():
    """Statistics ignore the contents of pads and the other texts of the batch."""
    q, k, v = random_qkv(30, batch=3, group=2)
    lengths = torch.tensor([30, 11, 1])
    padded = [x.clone() for x in (q, k, v)]
    for x in padded:
        for text, length in enumerate(lengths):
            x[text, :, length:] = 40.0 * torch.randn_like(x[text, :, length:])
    _, lse = attention.attend(*padded, scale=0.6)
    statistics = attention.summarise(
        padded[0],
        padded[1],
        lse,
        position=0,
        entropy=True,
        received=True,
        distances=q.shape[2],
        lengths=lengths,
        scale=0.6,
    )
    for text, length in enumerate(lengths.tolist()):
        unpadded = [x[text : text + 1, :, :length] for x in (q, k, v)]
        _, unpadded_lse = attention.attend(*unpadded, scale=0.6)
        expected = attention.summarise(
            unpadded[0],
            unpadded[1],
            unpadded_lse,
            position=0,
            entropy=True,
            received=True,
            distances=length,
            scale=0.6,
        )
        assert largest_difference(lse[text, :, :length], unpadded_lse[0]) < 1e-6
        for name in ("sink", "entropy", "received", "distance"):
            statistic = getattr(statistics, name)[text]
            assert largest_difference(statistic[:, :length], getattr(expected, name)[0]) < 1e-6, name
            if name in ("received", "distance"):
                assert (statistic[:, length:] == 0).all()


def test_pads_that_are_nan_do_not_reach_real_tokens():
    q, k, _ = random_qkv(12, dtype=torch.float32)
    q[0, :, 7:], k[0, :, 7:] = torch.nan, torch.inf
    _, lse = attention.attend(q, k, k, scale=0.6)
    lengths = torch.tensor([7, 12])
    statistics = attention.summarise(
        q, k, lse, position=0, entropy=True, received=True, distances=q.shape[2], lengths=lengths, scale=0.6
    )
    expected = dense(q[:, :, :7], k[:, :, :7], scale=0.6)
    assert largest_difference(statistics.sink[0, :, :7], expected.pattern[0, ..., 0]) < 1e-6
    assert largest_difference(statistics.entropy[0, :, :7], expected.entropy[0]) < 1e-6
    assert largest_difference(statistics.received[0, :, :7], expected.received[0]) < 1e-6
    assert statistics.entropy[0, :, 7:].isnan().all()
    assert not statistics.entropy[1].isnan().any()
    assert not statistics.received[1].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("operand", ["query", "key"])
def test_a_value_that_is_not_finite_gives_nan_exactly_where_it_is_used(value, dtype, operand):
    q, k, _ = random_qkv(10, batch=2, group=2, dtype=dtype)
    (q if operand == "query" else k)[0, 0, 4, 2] = value
    _, lse = attention.attend(q, k, k, scale=0.6)
    statistics = attention.summarise(q, k, lse, position=1, entropy=True, scale=0.6)
    sink = attention.sink_mass(q, k, lse, 1, scale=0.6)
    window = attention.window_mass(q, k, lse, 9, scale=0.6)
    touched = torch.zeros(2, 4, 10, dtype=torch.bool)
    if operand == "query":
        touched[0, 0, 4] = True
    else:
        touched[0, :2, 4:] = True
    for name, statistic in {
        "entropy": statistics.entropy,
        "sink": statistics.sink,
        "sink alone": sink,
        "window": window,
    }.items():
        assert torch.equal(statistic.isnan(), touched), name


def test_statistics_do_not_depend_on_the_batch():
    q, k, v = random_qkv(25, batch=4, group=2)
    _, lse = attention.attend(q, k, v, scale=0.8)
    statistics = attention.summarise(q, k, lse, position=0, entropy=True, received=True, scale=0.8)
    for text in range(4):
        row = slice(text, text + 1)
        _, row_lse = attention.attend(q[row], k[row], v[row], scale=0.8)
        row_statistics = attention.summarise(
            q[row], k[row], row_lse, position=0, entropy=True, received=True, scale=0.8
        )
        for name in ("sink", "entropy", "received"):
            assert largest_difference(getattr(statistics, name)[row], getattr(row_statistics, name)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_statistic_does_not_depend_on_the_other_statistics_computed(dtype):
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 4, 40, 16, generator=generator).to(dtype) for _ in range(2))
    _, lse = attention.attend(q, k, k, scale=0.25)
    options = {"position": 1, "entropy": True, "received": True, "distances": 5, "refine": True}
    statistics = attention.summarise(q, k, lse, scale=0.25, **options)
    names = {"position": "sink", "distances": "distance", "refine": "lse"}
    for option, value in options.items():
        single = attention.summarise(q, k, lse, scale=0.25, **{option: value})
        name = names.get(option, option)
        assert torch.equal(getattr(single, name), getattr(statistics, name)), name


@pytest.mark.parametrize(
    ("gain", "window", "softcap"), [(1, None, None), (1, 7, 5.0), (200, None, None), (200, 7, 20.0)]
)
def test_distance_mass_equals_float64(gain: float, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 150, 16) * gain, torch.randn(2, 2, 150, 16)
    options = {"scale": 0.25, "window": window, "softcap": softcap}
    _, lse = attention.attend(q, k, k, **options)
    pattern = attention.explicit(q.double(), k.double(), k.double(), **options)[2]
    lengths = torch.tensor([150, 40])
    mass = attention.distance_mass(q, k, lse, longest=70, lengths=lengths, **options)
    for row, n in enumerate(lengths.tolist()):
        for distance in range(70):
            real = pattern[row, :, :n, :n]
            expected = real.diagonal(-distance, 1, 2).sum(-1) if distance < n else torch.zeros(4)
            assert torch.allclose(mass[row, :, distance].double(), expected.double(), atol=1e-5 * n)
