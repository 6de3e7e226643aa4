"""Arguments and output shapes of calls to the GPU kernels, checked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phaselens import attention
from phaselens.attention import _flex, _kernels
from tests.attention.reference import dense, largest_difference, random_qkv

D, D_V = 65, 66


class KernelArguments(TorchDispatchMode):
    """Arguments of the fused kernels that are called inside the context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "scaled_dot_product" in func.overloadpacket.__name__:
            arguments = func._schema.arguments
            by_name = {argument.name: argument.default_value for argument in arguments}
            by_name |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
            self.calls.append(by_name | kwargs)
        return func(*args, **kwargs)


def states(n: int, dtype: torch.dtype, kv_heads: int = 2, d: int = D, d_v: int = D_V) -> list[torch.Tensor]:
    shapes = ((2, 4, n, d), (2, kv_heads, n, d), (2, kv_heads, n, d_v))
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "width"), [(33, 48), (32, 32), (1, 16)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_calls_fit_the_efficient_kernel(dtype, masked, n, width, kv_heads):
    """Efficient attention needs a key head for each query head, sizes in multiples of 8, and mask strides of 16."""
    q, k, v = states(n, dtype, kv_heads)
    added = torch.empty(1, 1, n, n, dtype=dtype, device="meta") if masked else None
    with KernelArguments() as kernel:
        out, lse = _kernels._cuda_efficient(q, k, v, 0.3, not masked, added)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, n, D_V), (2, 4, n), torch.float32)
    (call,) = kernel.calls
    assert [call[name].shape for name in ("query", "key", "value")] == [
        (2, 4, n, 72),
        (2, 4, n, 72),
        (2, 4, n, 72),
    ]
    assert (call["dropout_p"], call["is_causal"], call["scale"]) == (0.0, not masked, 0.3)
    assert call["compute_log_sumexp"] is True
    bias = call["attn_bias"]
    assert (bias is None) == (not masked)
    if masked:
        assert bias.shape == (2, 4, n, n)
        assert bias.stride()[2:] == (width, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("d", "d_v", "width"), [(20, 12, 24), (12, 20, 24), (16, 8, 16), (8, 17, 24), (1, 1, 8)]
)
def test_calls_fit_the_flash_kernel(causal, d, d_v, width):
    """Flash attention shares key heads itself, and needs one size of heads, a multiple of 8."""
    q, k, v = states(33, torch.float16, d=d, d_v=d_v)
    with KernelArguments() as kernel:
        out, lse = _kernels._cuda_flash(q, k, v, 0.3, causal)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, 33, d_v), (2, 4, 33), torch.float32)
    (call,) = kernel.calls
    assert [call[name].shape for name in ("query", "key", "value")] == [
        (2, n_heads, 33, width) for n_heads in (4, 2, 2)
    ]
    assert (call["dropout_p"], call["is_causal"], call["scale"]) == (0.0, causal, 0.3)
    assert call["return_debug_mask"] is False


@pytest.mark.parametrize(("generation", "is_new"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_flash_kernel_needs_an_ampere_gpu(monkeypatch, generation, is_new):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or generation
    )
    assert _flex.is_ampere(torch.device("cuda:1")) is is_new
    assert asked == [torch.device("cuda:1")]


@pytest.mark.parametrize(("d", "d_v"), [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("hidden", [[[0]], [[0], [0]], [[0, 0], [0, 0]], [[1]], [[0], [-1]], [[0, 2]]])
@pytest.mark.parametrize("n_queries", [6, 5, 1])
def test_hidden_keys_are_hidden_from_fused_attention(d, d_v, hidden, n_queries):
    """With one call where only key 0 is hidden and all queries are there, in blocks of rows elsewhere."""
    q, k, v = random_qkv(n_queries, 6, batch=2, group=2, d=d, d_v=d_v, dtype=torch.float64)
    keys = torch.tensor(hidden)
    mask = torch.ones(2, 1, n_queries, 6, dtype=torch.bool).tril(6 - n_queries)
    for text, text_keys in enumerate(keys.expand(2, -1).tolist()):
        mask[text, :, :, [key for key in text_keys if key >= 0]] = False
    expected = dense(q, k, v, scale=0.6, mask=mask)
    out, lse = attention.attend(q, k, v, scale=0.6, hidden_keys=keys)
    assert largest_difference(out, expected.out) < 1e-12
    assert largest_difference(lse, expected.lse) < 1e-12


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_a_kernel_cannot_apply_are_exact(scale):
    q, k, v = random_qkv(6, dtype=torch.float64)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 3, :] = False
    for options in ({}, {"window": 2}, {"mask": mask}):
        expected = dense(q, k, v, scale=scale, **options)
        out, lse = attention.attend(q, k, v, scale=scale, **options)
        assert largest_difference(out, expected.out) < 1e-12
        assert largest_difference(lse, expected.lse) < 1e-12


@pytest.mark.parametrize("n_rows", [1, 2, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_rows_equal_dense(monkeypatch, n_rows, dtype):
    """Rows of a mask that see nothing, before and after those that do, and keys that no query of a block sees."""
    monkeypatch.setattr(_kernels, "ROWS", n_rows)
    q, k, v = random_qkv(7, 9, group=2, d_v=5, dtype=dtype)
    mask = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[..., [0, 4, 6], :] = False
    mask[..., 0], mask[..., -1] = False, False
    biases = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for options in (
        {"mask": mask},
        {"mask": mask, "window": 4},
        {"mask": biases.masked_fill(~mask, -torch.inf).to(dtype)},
        {"window": 3},
    ):
        expected = dense(q, k, v, scale=0.6, **options)
        out, lse = attention.attend(q, k, v, scale=0.6, **options)
        assert largest_difference(out, expected.out) < tolerance
        assert largest_difference(lse, expected.lse) < tolerance
        assert not out[expected.lse == -torch.inf].any()


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_bias_may_have_another_type(dtypes, mask) -> None:
    q, k, v = random_qkv(6, dtype=dtypes[0])
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2)).to(dtypes[1])
    out, lse = attention.attend(q, k, v, scale=0.6, bias=bias, mask=mask)
    expected = dense(q, k, v, scale=0.6, bias=bias, mask=mask)
    assert out.dtype == dtypes[0]
    assert largest_difference(out, expected.out) < 1e-6
    assert largest_difference(lse, expected.lse) < 1e-6
