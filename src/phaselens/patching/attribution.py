"""Attribution patching: the effect of every cell at once, estimated from one gradient.

The effect of putting an activation of the clean run into the corrupt one is, to first order, the metric's gradient with
respect to the activation times its change (Nanda 2023, "Attribution Patching"). One forward of the clean run, and one
forward and backward of the corrupt one, whatever the number of cells; wrong where the metric is far from linear on the
way, as it is in the residual stream below norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.patching.metrics import LogitMetric
from phaselens.patching.passes import Hook, captured
from phaselens.patching.points import is_matrix, kind_point
from phaselens.patching.prompts import Prompt, bos_of
from phaselens.patching.results import Sweep

if TYPE_CHECKING:
    from torch import Tensor


def attribute(
    clean: Prompt,
    corrupt: Prompt,
    metric: LogitMetric,
    what: str,
    by: str,
    layers: Sequence[int],
    hooks: Sequence[Hook],
    base: float,
    reference: float,
) -> Sweep:
    """Every cell of `layers`; see `Experiment.attribution`, which calls it."""
    import numpy as np
    import torch

    lens = corrupt.lens
    names = [f"blocks.{layer}.{kind_point(what)}" for layer in layers]
    donor = captured(lens, clean.tokens, names)
    acts: dict[str, Tensor] = {}

    def watch(name: str) -> Hook:
        def hold(value: Tensor, hook: Any) -> Tensor:
            acts[name] = value
            # Returned, although unchanged: what the hook sees may be a view that nothing else follows from.
            return value

        return name, hold

    watched = lens.hooks(fwd_hooks=[_rooted(lens), *hooks, *map(watch, names)])
    with torch.enable_grad(), watched, lens.rows.reading(None):
        logits = lens.original_model(input_ids=corrupt.tokens, use_cache=False).logits
        value = metric(logits, corrupt.tokens).sum()
        if not value.requires_grad:
            raise InputError(
                f"attribution: {metric.name} has no gradient with respect to the logits, so nothing can be estimated "
                "from it; use sweep"
            )
        gradients = torch.autograd.grad(value, [acts[name] for name in names], allow_unused=True)
    rows = []
    for name, gradient in zip(names, gradients, strict=True):
        change = donor[name] - acts[name].detach()
        # No gradient at all: the metric does not depend on it.
        product = torch.zeros_like(change) if gradient is None else gradient * change
        rows.append(_by_cell(product.double()[0], by, name).cpu().numpy())
    estimate = np.ma.masked_array(np.stack(rows))
    return Sweep(
        what, by, base + estimate, base, reference, metric.name, tuple(layers),
        tuple(clean.words), tuple(corrupt.words), lens.info.n_heads, kind="attribution",
        bos=bos_of(clean, corrupt),
    )  # fmt: skip


def _rooted(lens: Any) -> Hook:
    """Gradients begin at the first layer, also where the weights ask for none."""

    def root(value: Tensor, hook: Any) -> Tensor:
        return value.detach().requires_grad_()

    return "blocks.0.hook_resid_pre", root


def _by_cell(product: Tensor, by: str, name: str) -> Tensor:
    """Sum what one cell covers: [pos], [head] or [pos, head] of [pos, d], [pos, head, d] or [head, query, key]."""
    if is_matrix(name):
        product = product.transpose(0, 1)
    if by == "pos":
        return product.flatten(1).sum(1)
    by_both = product.sum(-1)
    return by_both.sum(0) if by == "head" else by_both
