"""Short definitions of causal metrics, and their expected losses from plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from phaselens.plugin import CausalMetric, Condition, Edit, Params


def causal(*conditions: Condition, name: str = "causal", **changes: Any) -> type[CausalMetric[Params]]:
    """A causal metric with these conditions."""
    methods = {
        "name": name,
        "version": "1",
        "conditions": lambda self: list(conditions),
        "__module__": __name__,
        **changes,
    }
    return type("Causal", (CausalMetric,), methods)


def zero(point: str, *positions: int, name: str = "off", **options: Any) -> Condition:
    """A condition that writes one number at one point."""
    return Condition(name, [Edit(point, 0.0, positions or None)], **options)


def naive_loss(lens: Any, ids: Sequence[int], hooks: Sequence[tuple[str, Any]] = ()) -> torch.Tensor:
    """Loss [pos − 1] by TransformerLens' own run_with_hooks on the whole model, and PyTorch's cross-entropy."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        logits = lens.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))
    return functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:], reduction="none")


def losses(run: Any, metric: str = "causal") -> dict[tuple[str, str, int | None], float | None]:
    """Loss by (text, condition, layer)."""
    return {
        (record["text"], record["condition"], record["layer"]): record["loss"]
        for record in run.rows(metric, "texts").records()
    }
