"""How far two computations of the same thing may differ by rounding alone."""

from __future__ import annotations

import torch

LIMITS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference allowed, relative to the largest value compared: what reordering sums does to a dtype, with room.
Of a float64 model, transformers still computes norms and softmaxes in float32."""
