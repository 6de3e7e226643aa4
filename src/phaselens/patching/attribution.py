"""Attribution patching: the effects of all cells at once, estimated from one gradient.

The effect of putting an activation of the clean run into the corrupt run is, to first order, the metric's gradient with
respect to the activation times the change of the activation (Nanda 2023, "Attribution Patching"). It takes one forward
of the clean run, and one forward and backward of the corrupt run, whatever the number of cells. It is wrong where the
metric is far from linear between the two activations, as in the residual stream below norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.lens.points import Hook
from phaselens.patching.passes import capture_activations
from phaselens.patching.plans import SweepPlan
from phaselens.patching.results import Sweep
from phaselens.patching.targets import naming_keys, positions_first

if TYPE_CHECKING:
    from torch import Tensor


def attribute(plan: SweepPlan) -> Sweep:
    """Estimate every cell of the plan; see `Experiment.attribution`, which calls this."""
    import numpy as np
    import torch

    lens, tokens = plan.lens, plan.corrupt.tokens
    names = [plan.hook_name(layer) for layer in plan.layers]
    clean = capture_activations(lens, plan.clean.tokens, names)
    corrupt: dict[str, Tensor] = {}

    def keep_hook(name: str) -> Hook:
        def keep(value: Tensor, hook: object) -> Tensor:
            corrupt[name] = value
            # Returned although it is unchanged: the hook's tensor may be a view from which nothing else is computed.
            return value

        return name, naming_keys(name, keep)

    hooked_lens = lens.hooks(fwd_hooks=[_gradient_root(), *plan.hooks, *map(keep_hook, names)])
    with torch.enable_grad(), hooked_lens, lens.rows.with_lengths(None):
        logits = lens.original_model(input_ids=tokens, use_cache=False).logits
        value = plan.metric(logits, tokens).sum()
        if not value.requires_grad:
            raise InputError(
                f"attribution: {plan.metric.name} has no gradient with respect to the logits, so nothing can be "
                "estimated from it; use sweep"
            )
        gradients = torch.autograd.grad(value, [corrupt[name] for name in names], allow_unused=True)
    rows = []
    for name, gradient in zip(names, gradients, strict=True):
        # Scores that are −inf in both runs do not change.
        unedited = corrupt[name].detach()
        change = torch.where(clean[name] == unedited, 0.0, clean[name] - unedited)
        # The gradient is None where the metric does not depend on the activation.
        product = torch.zeros_like(change) if gradient is None else gradient * change
        rows.append(_sum_by_cell(positions_first(name, product.double())[0], plan.by).cpu().numpy())
    return plan.result(plan.base + np.ma.masked_array(np.stack(rows)), kind="attribution")


def _gradient_root() -> Hook:
    """Return a hook at which gradients start, also for a model whose weights require none."""

    def root(value: Tensor, hook: object) -> Tensor:
        return value.detach().requires_grad_()

    return "blocks.0.hook_resid_pre", root


def _sum_by_cell(product: Tensor, by: str) -> Tensor:
    """Sum [pos, d] or [pos, head, d] over each cell, which leaves [pos], [head] or [pos, head]."""
    if by == "pos":
        return product.flatten(1).sum(1)
    by_position_and_head = product.sum(-1)
    return by_position_and_head.sum(0) if by == "head" else by_position_and_head
