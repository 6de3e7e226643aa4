"""Whether torch is set to compute float32 products in float32."""

from __future__ import annotations

import torch


def products_are_exact(device: torch.device) -> bool:
    """Return whether products of float32 matrices on this device are not rounded to TF32 or bf16 first."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision in ("none", "ieee")
    # torch before 2.9 has one setting for all devices.
    return torch.get_float32_matmul_precision() == "highest"
