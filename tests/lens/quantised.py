"""Linear modules for tests that do not simply multiply their input by the weight that they store."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Packed(nn.Module):
    """Ternary weights, four per byte, with one scale, and 8-bit inputs, as in BitNet checkpoints."""

    def __init__(self, linear: nn.Linear, *, round_inputs: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().mean()
        ternary = (weight / scale).round().clamp(-1, 1)
        codes = (ternary + 1).to(torch.uint8).view(4, -1, self.in_features)
        packed = sum(code << 2 * index for index, code in enumerate(codes))
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None
        self.round_inputs = round_inputs

    @property
    def dense(self) -> Tensor:
        """[out, in], the unpacked weights."""
        codes = [(self.weight >> 2 * index & 3) for index in range(4)]
        return (torch.cat(codes).to(self.scale.dtype) - 1) * self.scale

    def rounded(self, inputs: Tensor) -> Tensor:
        if not self.round_inputs:
            return inputs
        scale = 127 / inputs.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return (inputs * scale).round().clamp(-128, 127) / scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rounded(inputs) @ self.dense.T


class Normed(nn.Linear):
    """A linear module that norms its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.rms_norm = nn.RMSNorm(linear.in_features, eps=1e-6, dtype=linear.weight.dtype)
        with torch.no_grad():
            self.rms_norm.weight.copy_(torch.linspace(0.5, 2.0, linear.in_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.rms_norm(inputs))


class Curved(nn.Linear):
    """A module that is not a product with any weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).tanh()
