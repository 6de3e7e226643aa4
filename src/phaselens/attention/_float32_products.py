"""Whether torch is set to compute float32 products in float32."""

from __future__ import annotations

import torch


def products_are_exact(device: torch.device) -> bool:
    """Return whether products of float32 matrices on this device are not rounded to TF32 or bf16 first."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is not None:
        return precision in ("none", "ieee")
    # torch before 2.9 has one setting for all devices.
    return torch.get_float32_matmul_precision() == "highest"
