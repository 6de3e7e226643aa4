"""Arguments and gradients that the streaming functions refuse."""

import pytest
import torch

from phaselens import attention
from phaselens.errors import InputError
from tests.attention.reference import random_qkv


def call_with(**overrides):
    """Call the streaming functions on a small problem with some arguments replaced."""
    q, k, v = random_qkv(6, batch=1)
    arguments = {"q": q, "k": k, "v": v, "lse": torch.zeros(1, 2, 6), "options": {"scale": 1.0}} | overrides
    q, k, v, lse, options = (arguments[name] for name in ("q", "k", "v", "lse", "options"))
    attention.attend(q, k, v, **options)
    attention.row_entropy(q, k, lse, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"q": torch.zeros(2, 6, 8)}, r"expected q \[batch, head, query, d_head\].*received q \(2, 6, 8\)"),
        ({"k": torch.zeros(1, 2, 6, 4)}, r"received q \(1, 2, 6, 8\) and k \(1, 2, 6, 4\)"),
        ({"k": torch.zeros(1, 3, 6, 8)}, "its heads dividing q's"),
        ({"k": torch.zeros(2, 2, 6, 8)}, "with q's batch"),
        ({"q": torch.zeros(1, 2, 0, 8)}, "at least one query and one key"),
        ({"k": torch.zeros(1, 2, 6, 8).half()}, "one floating dtype.*torch.float32.*torch.float16"),
        ({"q": torch.zeros(1, 2, 6, 8).int(), "k": torch.zeros(1, 2, 6, 8).int()}, "one floating dtype"),
        ({"q": torch.zeros(1, 2, 7, 8)}, "7 queries and 6 keys; pass a mask"),
        ({"v": torch.zeros(1, 2, 5, 8)}, r"expected v .*\(1, 2, 6, d_v\).*received \(1, 2, 5, 8\)"),
        ({"lse": torch.zeros(1, 2, 5)}, r"expected lse .*\(1, 2, 6\), received \(1, 2, 5\)"),
        ({"options": {"scale": 1.0, "window": 0}}, "window of at least 1 key.*received 0"),
        ({"options": {"scale": 1.0, "softcap": 0.0}}, "softcap above 0, received 0.0"),
        (
            {"options": {"scale": 1.0, "sink_logits": torch.zeros(3)}},
            r"sink_logits \[head\] = \(2,\), received \(3,\)",
        ),
        (
            {"options": {"scale": 1.0, "mask": torch.ones(1, 1, 6, 5, dtype=torch.bool)}},
            r"mask \[batch | 1, head | 1, query, key\] for \(1, 2, 6, 6\), received \(1, 1, 6, 5\)",
        ),
        ({"options": {"scale": 1.0, "mask": torch.ones(6, 6, dtype=torch.bool)}}, r"received \(6, 6\)"),
        (
            {"options": {"scale": 1.0, "mask": torch.ones(1, 1, 6, 6).int()}},
            "bool mask .* received torch.int32",
        ),
    ],
)
def test_errors_name_the_expected_and_the_received_argument(overrides, message):
    with pytest.raises(ValueError, match=message):
        call_with(**overrides)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_masks_and_biases_are_for_each_text_and_head_or_for_all(shape):
    q, k, v = random_qkv(5, batch=3, group=2)
    mask = torch.ones(*shape, 5, 5, dtype=torch.bool).tril()
    plain, _ = attention.attend(q, k, v, scale=0.5)
    for options in ({"mask": mask}, {"bias": torch.zeros(*shape, 1, 5)}, {"bias": torch.zeros(*shape, 5, 5)}):
        out, _ = attention.attend(q, k, v, scale=0.5, **options)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 5, 5), (1, 2, 5, 5), (3, 3, 5, 5), (1, 1, 4, 5), (1, 1, 5, 4), (1, 1, 5, 6), (1, 5, 5), (5,)],
)
def test_masks_and_biases_of_other_shapes_are_refused_with_both(shape):
    q, k, v = random_qkv(5, batch=3, group=2)
    with pytest.raises(ValueError, match=r"^expected a mask \[.*\] for \(3, 4, 5, 5\), received ") as caught:
        attention.attend(q, k, v, scale=0.5, mask=torch.ones(shape, dtype=torch.bool))
    assert str(caught.value).endswith(f"received {shape}")
    with pytest.raises(ValueError, match=r"^expected a bias \[.*\] for \(3, 4, 5, 5\), received ") as caught:
        attention.attend(q, k, v, scale=0.5, bias=torch.zeros(shape))
    assert str(caught.value).endswith(f"received {shape}")


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "start"),
    [
        (
            (2, 2, 5),
            (2, 2, 5, 4),
            "expected q [batch, head, query, d_head] and k [batch, kv_head, key, d_head]",
        ),
        (
            (2, 2, 5, 4),
            (2, 2, 5),
            "expected q [batch, head, query, d_head] and k [batch, kv_head, key, d_head]",
        ),
        ((2, 2, 5, 4), (1, 2, 5, 4), "expected k [batch, kv_head, key, d_head] with q's batch and d_head"),
        ((2, 2, 5, 4), (2, 2, 5, 3), "expected k [batch, kv_head, key, d_head] with q's batch and d_head"),
        ((2, 2, 5, 4), (2, 0, 5, 4), "expected k [batch, kv_head, key, d_head] with q's batch and d_head"),
        ((2, 3, 5, 4), (2, 2, 5, 4), "expected k [batch, kv_head, key, d_head] with q's batch and d_head"),
        ((2, 2, 0, 4), (2, 2, 5, 4), "expected at least one query and one key"),
        ((2, 2, 5, 4), (2, 2, 0, 4), "expected at least one query and one key"),
        ((0, 2, 5, 4), (0, 2, 5, 4), "expected at least one query and one key"),
    ],
)
def test_queries_and_keys_that_do_not_fit_are_refused_with_their_shapes(q_shape, k_shape, start):
    k = torch.ones(k_shape)
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        attention.attend(torch.ones(q_shape), k, k, scale=1.0)
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(f"received q {q_shape} and k {k_shape}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_without_a_softmax_are_refused_with_the_device(dtype):
    x = torch.ones(1, 1, 2, 4).to(dtype)
    with pytest.raises(ValueError, match=rf"^expected q and k of one .* {dtype} on cpu and {dtype} on cpu$"):
        attention.attend(x, x, x, scale=1.0)
    real = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"received torch.float32 on cpu and torch.float32 on meta$"):
        attention.attend(real, real.to("meta"), real, scale=1.0)


def test_values_have_the_keys_shape_and_dtype():
    q, k, v = random_qkv(5, batch=3, group=2, d_v=7)
    for call in (attention.attend, attention.explicit):
        assert call(q, k, v, scale=1.0)[0].shape == (3, 4, 5, 7)
        for wrong in (v[0], v[:2], v[:, :1], v[:, :, :4], v.double(), v.half()):
            with pytest.raises(
                ValueError, match=r"^expected v .* = \(3, 2, 5, d_v\) of torch.float32, "
            ) as caught:
                call(q, k, wrong, scale=1.0)
            assert str(caught.value).endswith(f"received {tuple(wrong.shape)} of {wrong.dtype}")


def test_a_mask_replaces_the_alignment_of_more_queries_than_keys():
    q, k, v = random_qkv(7, 6)
    with pytest.raises(ValueError, match=r"^expected at least .* 7 queries and 6 keys; .* which key$"):
        attention.attend(q, k, v, scale=1.0)
    everything = torch.ones(1, 1, 7, 6, dtype=torch.bool)
    assert attention.attend(q, k, v, scale=1.0, mask=everything)[0].shape == q.shape
    assert attention.attend(q[:, :, :6], k, v, scale=1.0)[0].shape == (2, 2, 6, 8)


@pytest.mark.parametrize("softcap", [0, -1.0])
def test_a_softcap_is_above_0(softcap):
    q, k, v = random_qkv(3)
    with pytest.raises(ValueError, match=rf"^expected a softcap above 0, received {softcap}$"):
        attention.attend(q, k, v, scale=1.0, softcap=softcap)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bias_is_finite(value):
    q, k, v = random_qkv(3)
    bias = torch.zeros(1, 1, 1, 3)
    bias[..., 1] = value
    with pytest.raises(
        ValueError, match=r"^expected a bias of finite numbers, received torch.float32; hide .* mask$"
    ):
        attention.attend(q, k, v, scale=1.0, bias=bias)


def test_positions_widths_and_lengths_out_of_range_are_refused():
    q, k, v = random_qkv(6, batch=1)
    _, lse = attention.attend(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="position in 0 … 5, received 6"):
        attention.sink_mass(q, k, lse, 6, scale=1.0)
    with pytest.raises(ValueError, match="position in 0 … 5, received -1"):
        attention.sink_mass(q, k, lse, -1, scale=1.0)
    with pytest.raises(ValueError, match="width of at least 1, or 0 with include_self, received 0"):
        attention.window_mass(q, k, lse, 0, scale=1.0)
    with pytest.raises(ValueError, match=r"lengths \[batch\] = \(1,\), received \(2,\)"):
        attention.received_mass(q, k, lse, lengths=torch.tensor([6, 6]), scale=1.0)
    with pytest.raises(ValueError, match=r"rows \[batch, head, query\].*received \(2, 6\)"):
        attention.query_mean(lse[0], torch.tensor([6, 6]))
    with pytest.raises(ValueError, match=r"received \[batch, head, key\].*received \(1, 2, 6\) and \(2,\)"):
        attention.concentration(lse, torch.tensor([6, 6]))
    with pytest.raises(ValueError, match="at least 1 token, received 0"):
        attention.uniform_sink(0)
    with pytest.raises(ValueError, match=r"at least 1 key .* received 0"):
        attention.uniform_entropy(3, window=0)


def test_the_scale_has_no_default():
    q, k, v = random_qkv(6)
    with pytest.raises(TypeError, match="scale"):
        attention.attend(q, k, v)


def test_streaming_functions_refuse_to_compute_gradients():
    q, k, v = random_qkv(6)
    lse = torch.zeros(q.shape[:3])
    for tensor in (q, k):
        tensor.requires_grad_()
        for run in (
            lambda: attention.attend(q, k, v, scale=1.0),
            lambda: attention.sink_mass(q, k, lse, scale=1.0),
            lambda: attention.row_entropy(q, k, lse, scale=1.0),
            lambda: attention.received_mass(q, k, lse, scale=1.0),
            lambda: attention.window_mass(q, k, lse, 2, scale=1.0),
            lambda: attention.refine_lse(q, k, lse, scale=1.0),
        ):
            with pytest.raises(RuntimeError, match=r"no gradient.*torch.no_grad\(\).*explicit"):
                run()
            with torch.no_grad():
                run()
        tensor.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no gradient"):
        attention.attend(q, k, v, scale=1.0, sink_logits=torch.zeros(2, requires_grad=True))


def test_explicit_attention_checks_its_sink_logits():
    scores = torch.zeros(1, 2, 3, 3)
    for shape in ((3,), (1, 2), ()):
        with pytest.raises(InputError, match=r"^expected sink_logits \[head\] = \(2,\), received ") as caught:
            attention.explicit_pattern(scores, sink_logits=torch.zeros(shape))
        assert str(caught.value).endswith(f"received {shape}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"real": torch.ones(2, 6, dtype=torch.bool)},
            r"real \[batch, query\] = \(1, 6\), received real \(2, 6\)$",
        ),
        (
            {"real": torch.ones(1, 5, dtype=torch.bool)},
            r"real \[batch, query\] = \(1, 6\), received real \(1, 5\)$",
        ),
        (
            {"real": torch.ones(1, 6, dtype=torch.bool), "lengths": torch.tensor([6])},
            r"either lengths or real .* received real \(1, 6\) and lengths$",
        ),
        ({"real": torch.ones(1, 6)}, r"real \[batch, query\] as a bool tensor, received torch.float32$"),
        ({"position": 6}, r"a position in 0 … 5, received 6$"),
        ({"position": -1}, r"a position in 0 … 5, received -1$"),
        ({"distances": 0}, r"distances as a whole number of at least 1, received 0$"),
        ({"lengths": torch.tensor([[6]])}, r"lengths \[batch\] = \(1,\), received \(1, 1\)$"),
        (
            {"segments": torch.zeros(1, 5, dtype=torch.long)},
            r"segments \[batch | 1, key\] with 6 keys, received \(1, 5\)$",
        ),
        (
            {"segments": torch.zeros(1, 6, dtype=torch.long), "n_segments": 0},
            r"n_segments as a whole number of at least 1, received 0$",
        ),
    ],
)
def test_summaries_refuse_arguments_that_do_not_fit(options, message):
    q, k, _ = random_qkv(6, batch=1)
    with pytest.raises(ValueError, match=f"^expected .*{message}"):
        attention.summarise(q, k, torch.zeros(1, 2, 6), scale=1.0, **options)


def test_distances_and_widths_have_a_smallest_value():
    q, k, _ = random_qkv(6, batch=1)
    lse = torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match=r"^expected longest as a whole number of at least 1, received 0$"):
        attention.distance_mass(q, k, lse, longest=0, scale=1.0)
    assert attention.distance_mass(q, k, lse, longest=1, scale=1.0).shape == (1, 2, 1)
    for width, include_self in ((-1, True), (-1, False), (0, False)):
        with pytest.raises(ValueError, match=rf"^expected a width of at least 1, .* received {width}$"):
            attention.window_mass(q, k, lse, width, include_self=include_self, scale=1.0)
    assert attention.window_mass(q, k, lse, 0, include_self=True, scale=1.0).shape == (1, 2, 6)
    assert attention.window_mass(q, k, lse, 1, scale=1.0).shape == (1, 2, 6)


def test_statistics_that_were_not_requested_are_none():
    q, k, _ = random_qkv(6, batch=1)
    lse = torch.zeros(1, 2, 6)
    names = {"position": "sink", "distances": "distance", "refine": "lse"}
    requests = {
        "position": 0, "itself": True, "entropy": True, "received": True, "distances": 1, "top": True,
        "segments": torch.zeros(1, 6, dtype=torch.long), "largest": True, "refine": True,
    }  # fmt: skip
    for request, value in requests.items():
        summary = attention.summarise(q, k, lse, scale=1.0, **{request: value})
        computed = [name for name, statistic in vars(summary).items() if statistic is not None]
        assert computed == [names.get(request, request)]
    assert set(vars(attention.summarise(q, k, lse, scale=1.0)).values()) == {None}
