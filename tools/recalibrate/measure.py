"""Statistics for the log on held-out windows: loss, sinks, BOS norm, matrix entropy and the BOS-MLP ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tools.recalibrate.loss import next_token_loss
from tools.train_pair.measure import measure as measure_by_layer
from torch import Tensor


@torch.no_grad()
def held_out_loss(model: Any, head: Tensor, texts: Tensor, batch_size: int = 8) -> float:
    """Return the mean next-token loss on `texts`, [text, position], in nats."""
    total = 0.0
    for batch in texts.split(batch_size):
        hidden = model.model(batch, use_cache=False).last_hidden_state
        total += next_token_loss(hidden, head, batch).item() * len(batch)
    return total / len(texts)


def sinks_and_spike(model: Any, head: Tensor, texts: Tensor) -> dict[str, Any]:
    """Measure `model` on `texts`, [text, position] with BOS first, all of one length.

    Returns:
        `sink_rate`: share of heads with a mean attention to BOS of at least 0.3; `bos_norm`: largest over layers, at
        `bos_norm_layer`; `entropy`: least over layers, nats, at `entropy_layer`; `write_layer`: the layer
        after which the norm of BOS has grown most, and `bos_mlp_ratio`: the perplexity with that layer's MLP output
        at BOS set to zero over that without.
    """
    by_layer = measure_by_layer(model, texts, batch_size=4)
    norms, entropies = torch.tensor(by_layer["bos_norm"]), torch.tensor(by_layer["entropy"])
    write_layer = int(torch.diff(norms, prepend=norms.new_zeros(1)).argmax())
    with _without_bos_mlp(model, write_layer):
        ablated = held_out_loss(model, head, texts)
    return {
        "sink_rate": by_layer["sink_rate"],
        "bos_norm": norms.max().item(),
        "bos_norm_layer": int(norms.argmax()),
        "entropy": entropies.min().item(),
        "entropy_layer": int(entropies.argmin()),
        "write_layer": write_layer,
        "bos_mlp_ratio": math.exp(ablated - held_out_loss(model, head, texts)),
    }


@contextmanager
def _without_bos_mlp(model: Any, layer: int) -> Iterator[None]:
    """Set what the MLP of `layer` adds at position 0 to zero."""

    def zero_first(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] = 0.0
        return output

    hook = model.model.layers[layer].mlp.register_forward_hook(zero_first)
    try:
        yield
    finally:
        hook.remove()
