"""Dense float64 reference for spectra."""

from __future__ import annotations

import numpy as np
import torch


def dense(x: torch.Tensor) -> tuple[float, float]:
    """(entropy, p1) from all singular values in float64."""
    p = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum()), float(p.max())
