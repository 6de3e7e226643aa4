"""Every operand is on the device of the inputs, shown by tensors without numbers on a machine without a GPU.

Indices and lengths may lie elsewhere: they are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phaselens import attention
from phaselens.attention import _accumulators, _statistics

BATCH, HEADS, KV_HEADS, N, D = 2, 4, 2, 9, 8


class OneDevice(TorchDispatchMode):
    """Fails at an operator with operands on two devices, other than a copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        assert name in ("_to_copy", "copy_") or len({tensor.device for tensor in tensors}) <= 1, name
        return func(*args, **(kwargs or {}))


def device_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


Q, K, LSE = (
    device_tensor(BATCH, HEADS, N, D),
    device_tensor(BATCH, KV_HEADS, N, D),
    device_tensor(BATCH, HEADS, N),
)
ROWS, W_O, MASS = device_tensor(BATCH, HEADS, N), device_tensor(HEADS, D, 5), device_tensor(HEADS, N)
LENGTHS, KEYS = torch.tensor([N, 5]), torch.tensor([[1], [-1]])
LABELS = torch.zeros(BATCH, N, dtype=torch.long)
REST = attention.Remainder(Q, LSE)
CALLS: dict[str, Callable[[], Any]] = {
    "query_mean": lambda: attention.query_mean(ROWS, LENGTHS, first=1, last=6),
    "sink_score": lambda: attention.sink_score(ROWS, LENGTHS, window=3),
    "normalised_entropy": lambda: attention.normalised_entropy(ROWS, window=3),
    "concentration": lambda: attention.concentration(ROWS, LENGTHS),
    "norm_matrix": lambda: attention.norm_matrix(device_tensor(40, HEADS, D)),
    "massive_cells": lambda: attention.massive_cells(device_tensor(HEADS, D)),
    "pair_norms": lambda: attention.pair_norms(device_tensor(HEADS, D), [(0, 4), (1, 5)]),
    "head_norms": lambda: attention.head_norms(device_tensor(N, HEADS, D), device_tensor(HEADS, 5, D)),
    "writes": lambda: attention.writes(MASS, device_tensor(HEADS, D), W_O),
    "scaled_writes": lambda: attention.scaled_writes(
        MASS, device_tensor(N, HEADS, D), W_O, device_tensor(HEADS, 5, D)
    ),
    "key_geometry": lambda: attention.key_geometry(
        Q[0].transpose(0, 1), K[0].transpose(0, 1), scale=1.0, position=1, window=4
    ),
    "key_geometry without queries": lambda: attention.key_geometry(
        Q[0].transpose(0, 1), K[0].transpose(0, 1), scale=1.0, position=N
    ),
    "key_scores": lambda: attention.key_scores(Q, K, KEYS, scale=1.0, window=3),
    "output": lambda: REST.output(K, KEYS, device_tensor(BATCH, HEADS, N, 1)),
    "weights": lambda: REST.weights(device_tensor(BATCH, HEADS, N, 1)),
    "explicit": lambda: attention.explicit(Q, K, K, scale=1.0, window=3),
    "explicit with sink logits": lambda: attention.explicit(
        Q, K, K, scale=1.0, sink_logits=device_tensor(HEADS)
    ),
    "explicit with a mask": lambda: attention.explicit(
        Q, K, K, scale=1.0, mask=device_tensor(1, 1, N, N, dtype=torch.bool), window=3
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_on_the_device_of_the_inputs(name: str) -> None:
    with OneDevice():
        result = CALLS[name]()
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.device.type == "meta"


@pytest.mark.parametrize("n_queries", [N, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 2.0, "sink_logits": device_tensor(HEADS)},
        {"mask": device_tensor(1, 1, N, N, dtype=torch.bool)},
    ],
    ids=["causal", "window", "cap and sink logits", "mask"],
)
def test_statistics_stay_on_the_device_of_the_inputs(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], n_queries: int
) -> None:
    """With no head to compute in float64: which heads these are is read on the host."""
    for module in (_statistics, _accumulators):
        monkeypatch.setattr(module, "large_heads", lambda problem, lse: [])
    q, lse = Q[:, :, :n_queries], LSE[:, :, :n_queries]
    if "mask" in options:
        options = {"mask": options["mask"][:, :, :n_queries]}
        monkeypatch.setattr(
            "phaselens.attention._problem.Problem.visible_extents", [(0, N)] * n_queries, raising=False
        )
    with OneDevice():
        summary = attention.summarise(
            q, K, lse, scale=1.0, position=0, itself=True, entropy=True, received=True, distances=4, top=True,
            largest=True, segments=LABELS, n_segments=2, refine=True, lengths=LENGTHS, **options,
        )  # fmt: skip
        window = attention.window_mass(q, K, lse, 3, scale=1.0, **options)
        distance = attention.distance_mass(q, K, lse, longest=2, lengths=LENGTHS, scale=1.0, **options)
    for statistic in (window, distance, *vars(summary).values()):
        assert statistic.device.type == "meta"
