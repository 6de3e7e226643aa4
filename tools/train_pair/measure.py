"""Statistics for the log on held-out plain text: loss, sinks, BOS norm ratio and matrix entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from transformers import LlamaForCausalLM

TAU = 0.3


def matrix_entropy(residual: torch.Tensor) -> torch.Tensor:
    """Return Von Neumann entropy of each text's residual: [text, position, d_model] -> [text], nats, in float64."""
    rows = residual.double()
    gram = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
    values = torch.linalg.eigvalsh(gram)
    # Rounding leaves eigenvalues that should be 0 at about -1e-16 of the largest; they carry no entropy.
    p = torch.where(values > 0, values, torch.zeros_like(values))
    p = p / p.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1)


def bos_ratio(residual: torch.Tensor) -> torch.Tensor:
    """Return norm of position 0 over the median norm of the others: [text, position, d_model] -> [text]."""
    norms = residual.double().norm(dim=-1)
    return norms[:, 0] / norms[:, 1:].median(dim=-1).values


@torch.no_grad()
def measure(model: LlamaForCausalLM, texts: torch.Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Measure `model` on `texts`, [text, position] with `<s>` first, all of one length.

    Return the mean next-token loss in nats, and by layer: `sink` [layer][head] (attention to position 0,
    query 0 excluded, mean over queries and texts), `bos_ratio`, `bos_norm`, `entropy` (means over texts); and
    `sink_rate`, the share of all heads whose `sink` is at least 0.3. Residuals are those after each layer,
    before the final norm.
    """
    layers = model.model.layers
    residuals: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: residuals.append(_residual_of(output)))
        for layer in layers
    ]
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    losses, sinks, ratios, entropies, norms = [], [], [], [], []
    try:
        for batch in texts.split(batch_size):
            residuals.clear()
            output = model(batch, output_attentions=True, use_cache=False)
            flat = output.logits[:, :-1].float().flatten(0, 1)
            losses.append(
                functional.cross_entropy(flat, batch[:, 1:].flatten(), reduction="none")
                .view(len(batch), -1)
                .mean(1)
            )
            sinks.append(torch.stack([a[:, :, 1:, 0].float().mean(-1) for a in output.attentions], dim=1))
            ratios.append(torch.stack([bos_ratio(r) for r in residuals], dim=1))
            norms.append(torch.stack([r[:, 0].double().norm(dim=-1) for r in residuals], dim=1))
            entropies.append(torch.stack([matrix_entropy(r) for r in residuals], dim=1))
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(implementation)
        model.train(training)
    sink = torch.cat(sinks).mean(0)
    return {
        "loss": torch.cat(losses).mean().item(),
        "sink": [[round(v, 5) for v in row] for row in sink.tolist()],
        "sink_rate": (sink >= TAU).double().mean().item(),
        "bos_ratio": [round(v, 4) for v in torch.cat(ratios).mean(0).tolist()],
        "bos_norm": [round(v, 4) for v in torch.cat(norms).mean(0).tolist()],
        "entropy": [round(v, 4) for v in torch.cat(entropies).mean(0).tolist()],
    }


def _residual_of(output: Any) -> torch.Tensor:
    """Return the residual from a decoder layer's output, which is a tuple in some versions of transformers."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()
