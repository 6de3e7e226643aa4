"""No operation creates an L × L tensor: the largest tensor is O(L · block)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phaselens import attention
from phaselens.attention import _kernels, _key_blocks
from tests.attention.reference import random_qkv
from tests.marks import mark_later_slow

N = 1000


class LargestTensor(TorchDispatchMode):
    """Records the largest storage of any tensor that an operation returns, except `inputs` and their views."""

    def __init__(self, *inputs):
        super().__init__()
        self.cells = 0
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.inputs:
                self.cells = max(self.cells, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_the_largest_tensor_of_the_dense_path_is_a_matrix():
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    with LargestTensor() as largest:
        attention.explicit(q, k, v, scale=0.3)
    assert largest.cells >= N * N


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 40},
        {"softcap": 5.0},
        {"sink_logits": torch.zeros(1)},
        {"bias": torch.arange(N)[None, None, None] / 2.0},
    ],
    ids=["causal", "window", "softcap", "sink_logits", "alibi"],
)
@pytest.mark.parametrize("size", mark_later_slow([1.0, 1e4]), ids=["float32", "recomputed in float64"])
def test_streaming_functions_create_no_matrix(options, size, monkeypatch):
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", 1 << 14)
    monkeypatch.setattr(_key_blocks, "ROWS", 40)
    monkeypatch.setattr(_kernels, "ROWS", 64)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    q = q * size
    with LargestTensor() as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, **options)
        attention.sink_mass(q, k, lse, scale=0.3, **options)
        attention.summarise(
            q, k, lse, position=0, entropy=True, received=True, distances=q.shape[2], scale=0.3, **options
        )
        attention.window_mass(q, k, lse, 5, scale=0.3, **options)
        attention.refine_lse(q, k, lse, scale=0.3, **options)
    assert largest.cells <= 64 * N < N * N / 15


def test_memory_with_a_window_depends_on_its_width(monkeypatch):
    monkeypatch.setattr(_kernels, "ROWS", 64)
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", 1 << 10)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    with LargestTensor() as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, window=40)
        attention.row_entropy(q, k, lse, scale=0.3, window=40)
    assert largest.cells <= max(N * q.shape[-1], (64 + 40) * (128 + 40))


@pytest.mark.parametrize("mask_format", ["bool", "additive", "biased"])
def test_a_mask_is_never_copied_in_full(mask_format, monkeypatch):
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", 1 << 14)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    if mask_format != "bool":
        mask = torch.zeros(1, 1, N, N).masked_fill(~mask, -torch.inf)
    if mask_format == "biased":
        mask[..., 0] = -1.0
    with LargestTensor(mask) as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, mask=mask)
        attention.row_entropy(q, k, lse, scale=0.3, mask=mask)
        attention.sink_mass(q, k, lse, scale=0.3, mask=mask)
    assert largest.cells <= 256 * N < N * N / 3
