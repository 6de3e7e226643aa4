"""Traps in what heads write into the residual stream. Every `*_script` function is wrong on purpose."""

from __future__ import annotations

import torch
from tools.traps.attention import sink_scores
from tools.traps.bench import Bench, Trap, TrapNumbers, largest, mean
from tools.traps.dense import DenseText, softmax_attention
from torch import Tensor


def write_script(text: DenseText) -> Tensor:
    """Return attention on key 0 times the norm of its value, [layer, head], as if W_O kept norms."""
    return sink_scores(text.pattern) * text.v[..., 0, :].norm(dim=-1)


def value_norm(bench: Bench) -> TrapNumbers:
    """Measure what a head writes from position 0, in the residual stream."""
    weights = [bench.dense.output_weight(layer) for layer in range(len(bench.dense.layers))]
    exact = [
        mean(
            (sink_scores(text.pattern[layer]) * (text.v[layer, :, :1] @ weight)[:, 0].norm(dim=-1)).mean()
            for layer, weight in enumerate(weights)
        )
        for text in bench.dense_texts
    ]
    return TrapNumbers(
        mean(exact),
        bench.mean("bos-write", "texts", "true_write"),
        mean(write_script(text).mean() for text in bench.dense_texts),
    )


def subtracted_script(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the output without key 0 as (o − p₀v₀) / (1 − p₀), which cancels where p₀ is near 1."""
    pattern = softmax_attention(q, k, scale)
    sink = pattern[..., :1]
    return (pattern @ v - sink * v[..., :1, :]) / (1 - sink)


def subtraction(bench: Bench) -> TrapNumbers:
    """Measure the largest relative error of a head's output without key 0."""
    from phaselens.attention import attend_without

    measured, script = [], []
    for text in bench.dense_texts:
        q, k, v, scale = text.q.float(), text.k.float(), text.v.float(), bench.dense.scale
        pattern = softmax_attention(q.double()[..., 1:, :], k.double()[..., 1:, :], scale)
        exact = pattern @ v.double()[..., 1:, :]
        remainder = attend_without(q, k, v, torch.tensor([[0]]), scale=scale).out[..., 1:, :]
        subtracted = subtracted_script(q, k, v, scale)[..., 1:, :]
        for outputs, errors in ((remainder, measured), (subtracted, script)):
            errors.append(((outputs - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    return TrapNumbers(0.0, largest(measured), largest(script))


TRAPS = (
    Trap("A value's norm before W_O", "norm written from position 0 by a head", 0.01, value_norm),
    Trap("The sink removed by subtraction", "largest relative error of a head's output", 1e-5, subtraction),
)
