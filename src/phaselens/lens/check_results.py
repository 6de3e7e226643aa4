"""The result of one check of the self-check, and differences between tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: `measured` must not exceed `limit`; `detail` names the worst layer or the finding."""

    name: str
    ok: bool
    measured: float
    limit: float
    detail: str = ""


def difference(measured: Tensor, expected: Tensor, *, relative: bool = True) -> float:
    """Return the largest difference, relative to the largest expected magnitude; inf if their finite entries differ."""
    measured, expected = measured.detach().double(), expected.detach().double().to(measured.device)
    finite = expected.isfinite()
    if not torch.equal(finite, measured.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = float((measured[finite] - expected[finite]).abs().max())
    scale = float(expected[finite].abs().max()) if relative else 1.0
    return gap / scale if scale > 0 else gap


def worst(name: str, limit: float, by_layer: dict[int, float], prefix: str = "worst in layer") -> CheckResult:
    """Return the result of a check by the layer with the largest difference."""
    if not by_layer:
        return CheckResult(name, True, 0.0, limit, "no layer has attention")
    layer = max(by_layer, key=lambda index: by_layer[index])
    gap = by_layer[layer]
    detail = f"{prefix} {layer}" if gap > 0 else "no difference"
    return CheckResult(name, gap <= limit, gap, limit, detail)
