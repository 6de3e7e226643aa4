"""One projection of a layer: its weight, its bias, and the inputs that it multiplies. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """A projection whose module computes ``multiplied(inputs) @ weight + bias``, within rounding.

    ``weight`` has TransformerLens' shape: W_Q, W_K, W_V [head, d_model, d_head], W_O [head, d_head, d_model], those of
    an MLP [in, out]. ``bias`` is flat, [out]. ``rounding`` names the format to which the module rounds its input, empty
    without rounding; ``norm`` is a norm inside the module, before the product.

    >>> import torch
    >>> projection = Projection(torch.eye(2)[None], torch.zeros(2), rounding="8-bit integers")
    >>> projection.multiplied(torch.tensor([127.0, 0.4])).tolist()
    [127.0, 0.0]
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    rounding: str = ""
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the module multiplies its input unchanged."""
        return not self.rounding and self.norm is None

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return the input [..., in] or [..., head, d_head] after a norm inside the module, before rounding."""
        return inputs if self.norm is None else self._on_flat(self.norm, inputs)

    def multiplied(self, inputs: Tensor) -> Tensor:
        """Return the values that the module multiplies by the weight when its input is `inputs`, in the same shape."""
        scaled = self.scaled(inputs)
        return self._on_flat(ROUNDINGS[self.rounding], scaled) if self.rounding else scaled

    def _on_flat(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Apply `function` to inputs with their heads flattened into one dimension."""
        shape = self.weight.shape
        by_head = len(shape) == 3 and shape[-1] == len(self.bias) and inputs.shape[-2:] == shape[:2]
        return function(inputs.flatten(-2) if by_head else inputs).detach().view(inputs.shape)


def _integers(levels: float, *, step: bool = False, inverse: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds to integers, by one scale per token that brings its largest entry to `levels`.

    Some modules multiply by that scale, others divide by its inverse, the step, or multiply by the step's inverse. The
    three round entries near the middle between two integers differently.
    """

    def rounded(inputs: Tensor) -> Tensor:
        largest = inputs.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        if inverse:
            integers = inputs * (1.0 / (largest / levels))
        else:
            integers = inputs / (largest / levels) if step else inputs * (levels / largest)
        integers = integers.round().clamp(-int(levels) - 1, int(levels))
        return integers * (largest / levels) if step or inverse else integers / (levels / largest)

    return rounded


def _integers_without_outliers(inputs: Tensor) -> Tensor:
    """Round to 16-bit floats, and entries below 6 further to 8-bit integers, as LLM.int8 does for a text of one token.

    In a longer text, an entry of 6 or more also keeps the same dimension of other tokens from being rounded further.
    """
    import torch

    half = inputs.to(torch.float16)
    is_outlier = half.abs() >= 6.0
    largest = half.masked_fill(is_outlier, 0.0).abs().amax(-1, keepdim=True).float().clamp(min=1e-5)
    integers = (half * (127.0 / largest)).round().clamp(-127, 127)
    return torch.where(is_outlier, half.to(inputs.dtype), (integers * (largest / 127.0)).to(inputs.dtype))


def _floats(*, step: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds to 8-bit floats, by one scale per token that brings its largest entry to the
    largest 8-bit float; `step` as in `_integers`."""

    def rounded(inputs: Tensor) -> Tensor:
        import torch

        dtype = torch.float8_e4m3fn
        largest, limit = inputs.abs().amax(-1, keepdim=True).clamp(min=1e-12), torch.finfo(dtype).max
        if step:
            return (inputs / (largest / limit)).to(dtype).to(inputs.dtype) * (largest / limit)
        return (inputs * (limit / largest)).to(dtype).to(inputs.dtype) / (limit / largest)

    return rounded


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "8-bit integers": _integers(127),
    "8-bit integers, in steps": _integers(127, step=True),
    "8-bit integers, -128 to 127": _integers(127.5, step=True),
    "8-bit integers, -128 to 127, by the step's inverse": _integers(127.5, inverse=True),
    "8-bit integers, except outliers": _integers_without_outliers,
    "8-bit floats": _floats(),
    "8-bit floats, in steps": _floats(step=True),
    "4-bit integers": _integers(7, step=True),
}
"""The ways in which modules round their input, by name."""
