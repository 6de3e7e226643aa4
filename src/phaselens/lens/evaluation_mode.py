"""Evaluation mode of modules, set without the time that `Module.eval` takes on a wrapped model."""

from __future__ import annotations

from torch import nn


def evaluate(model: nn.Module) -> None:
    """Call `model.eval()` unless all of its modules are in evaluation mode already."""
    if any(module.training for module in model.modules()):
        model.eval()


def evaluate_parts(bridge: nn.Module) -> None:
    """Set each module of a bridge to evaluation mode once.

    `eval` would visit a module that several parts of the bridge share once for each of them.
    """
    for module in bridge.modules():
        if module.training:
            module.training = False
