"""No L × L tensor is made, whatever is asked: the largest tensor of any operation stays O(L · block)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phaselens import attention
from phaselens.attention import _kernels, _strips
from tests.attention.reference import random_qkv
from tests.marks import first_quick

N = 1000


class Largest(TorchDispatchMode):
    """Remembers the largest storage behind any tensor that an operation returns, `given` ones and views aside."""

    def __init__(self, *given):
        super().__init__()
        self.cells = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.given:
                self.cells = max(self.cells, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_the_measure_sees_a_matrix():
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    with Largest() as largest:
        attention.explicit(q, k, v, scale=0.3)
    assert largest.cells >= N * N


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 40}, {"softcap": 5.0}, {"sinks": torch.zeros(1)}],
    ids=["causal", "window", "softcap", "sinks"],
)
@pytest.mark.parametrize("size", first_quick([1.0, 1e4]), ids=["float32", "float64 again"])
def test_no_matrix(options, size, monkeypatch):
    monkeypatch.setattr(_strips, "CPU_ELEMENTS", 1 << 14)
    monkeypatch.setattr(_strips, "ROWS", 40)
    monkeypatch.setattr(_kernels, "ROWS", 64)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    q = q * size
    with Largest() as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, **options)
        attention.sink_mass(q, k, lse, scale=0.3, **options)
        attention.summarise(
            q, k, lse, position=0, entropy=True, received=True, distances=q.shape[2], scale=0.3, **options
        )
        attention.window_mass(q, k, lse, 5, scale=0.3, **options)
        attention.refine_lse(q, k, lse, scale=0.3, **options)
    assert largest.cells <= 64 * N < N * N / 15


def test_a_window_costs_its_width_and_not_the_text(monkeypatch):
    monkeypatch.setattr(_kernels, "ROWS", 64)
    monkeypatch.setattr(_strips, "CPU_ELEMENTS", 1 << 10)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    with Largest() as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, window=40)
        attention.row_entropy(q, k, lse, scale=0.3, window=40)
    assert largest.cells <= max(N * q.shape[-1], (64 + 40) * (128 + 40))


@pytest.mark.parametrize("kind", ["bool", "additive", "biased"])
def test_a_given_mask_is_never_copied_whole(kind, monkeypatch):
    monkeypatch.setattr(_strips, "CPU_ELEMENTS", 1 << 14)
    q, k, v = random_qkv(N, batch=1, kv_heads=1)
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    if kind != "bool":
        mask = torch.zeros(1, 1, N, N).masked_fill(~mask, -torch.inf)
    if kind == "biased":
        mask[..., 0] = -1.0
    with Largest(mask) as largest:
        _, lse = attention.attend(q, k, v, scale=0.3, mask=mask)
        attention.row_entropy(q, k, lse, scale=0.3, mask=mask)
        attention.sink_mass(q, k, lse, scale=0.3, mask=mask)
    assert largest.cells <= 256 * N < N * N / 3
