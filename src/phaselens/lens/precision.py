"""Limits on the difference that rounding alone makes between two computations of one quantity."""

from __future__ import annotations

import torch

LIMITS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference allowed, relative to the largest value compared: the effect of reordering sums, with room.
Even in a float64 model, transformers computes norms and softmaxes in float32."""
