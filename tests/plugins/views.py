"""Hand-made models and layers for tests of metrics, and a metric's tables as records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from phaselens.plugin import Batch, LayerView, Metric, ModelInfo, Projection
from phaselens.testing import model_info


def info(n_layers: int = 1, n_heads: int = 2, d_head: int = 4, **facts: Any) -> ModelInfo:
    """Return the facts of a model that exists only in its activations."""
    return model_info(
        n_layers=n_layers,
        n_heads=n_heads,
        d_head=d_head,
        d_model=n_heads * d_head,
        scales=(1.0,) * n_layers,
        **facts,
    )


def view(
    activations: Mapping[str, Tensor], lengths: tuple[int, ...], index: int = 0, weight: Tensor | None = None
) -> LayerView:
    """Return one layer of a batch whose texts are named a, b, c, …"""
    n_pos = next(iter(activations.values())).shape[1]
    ids = tuple("abcdefgh"[: len(lengths)])
    tokens = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) if n_pos else torch.zeros(1, 1)
    batch = Batch(ids, tuple(range(len(lengths))), lengths, tokens)
    if weight is None:
        return LayerView(index, batch, activations)
    output = Projection(weight, weight.new_zeros(weight.shape[-1]))
    return LayerView(
        index, batch, activations, {"attn.W_O": weight}.__getitem__, {"attn.W_O": output}.__getitem__
    )


def attention_activations(pattern: Tensor) -> dict[str, Tensor]:
    """Return hooked activations of attention whose matrix is `pattern` [head, query, key]: q = ln p on unit keys."""
    from phaselens.attention import attend, summarise

    n_heads, n, _ = pattern.shape
    q = pattern.double().clamp(min=1e-40).log()[None]
    k = torch.eye(n, dtype=torch.float64).expand(1, n_heads, n, n)
    _, lse = attend(q, k, k, scale=1.0)
    stats = summarise(q, k, lse, scale=1.0, position=0, entropy=True, received=True, distances=64)
    return {
        "attn.hook_sink": stats.sink,
        "attn.hook_entropy": stats.entropy,
        "attn.hook_received": stats.received,
        "attn.hook_distance": stats.distance,
    }


def rows(metric: Metric[Any], table: str) -> list[dict[str, Any]]:
    """Return the records of one of the metric's tables."""
    return metric.compute()[table].records()
