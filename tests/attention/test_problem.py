"""Arguments and gradients that the streaming functions refuse."""

import pytest
import torch

from phaselens import attention
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
