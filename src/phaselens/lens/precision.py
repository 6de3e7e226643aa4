"""Limits on the difference that rounding alone makes between two computations of one quantity."""

from __future__ import annotations

import torch

LIMITS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference allowed, relative to the largest value compared: the effect of reordering sums, with room.
Even in a float64 model, transformers computes norms and softmaxes in float32."""

STATISTICS_LIMITS = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}
"""The largest difference allowed between streamed statistics and those of the same queries and keys in float64. The
fused kernels for half precision compute exponentials less exactly."""
