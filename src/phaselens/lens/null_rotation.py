"""Rotations by no angle, in the forms in which models hold cosines and sines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def null_rotation(_module: object, _args: object, rotation: Any) -> Any:
    """Replace a rotary module's output by a rotation by no angle; a forward hook.

    The output is (cos, sin), or one tensor of complex numbers. YaRN and longrope multiply it by an attention factor,
    the length of the vector (cos, sin), which stays.
    """
    if isinstance(rotation, Tensor):
        return _length(rotation.real, rotation.imag) + 0j if rotation.is_complex() else None
    if not isinstance(rotation, tuple) or len(rotation) != 2:
        return None
    cos, sin = rotation
    return _length(cos, sin), torch.zeros_like(sin)


def _length(cos: Tensor, sin: Tensor) -> Tensor:
    """Return the length of each vector (cos, sin); exactly 1 where only rounding makes it differ from 1."""
    length = torch.hypot(cos.double(), sin.double())
    is_one = (length - 1.0).abs() <= 4 * torch.finfo(cos.dtype).eps
    return torch.where(is_one, 1.0, length).to(cos)


def at_origin(rotation: Any) -> tuple[Tensor, ...] | None:
    """Return a copy of a rotation at the first position, [1, 1, d_rotary] each; None for another value."""
    parts = (rotation,) if isinstance(rotation, Tensor) and rotation.is_complex() else rotation
    if not isinstance(parts, tuple) or not parts or not all(isinstance(part, Tensor) for part in parts):
        return None
    is_rotation = len(parts) == 2 or (len(parts) == 1 and parts[0].is_complex())
    return tuple(part[..., :1, :].detach().clone() for part in parts) if is_rotation else None


def cos_and_sin(origin: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines at the first position, in whichever form the model holds them."""
    if len(origin) == 1:
        return origin[0].real, origin[0].imag
    first, second = origin
    # GPT-J and CodeGen hold the sines first since transformers 5.24; at the first position they are 0.
    return (first, second) if bool(first.any()) else (second, first)


def rotates(origin: tuple[Tensor, ...]) -> bool:
    """Return whether the rotation at the first position has an angle."""
    return bool(cos_and_sin(origin)[1].any())


def held_at(origin: tuple[Tensor, ...], rotation: Any) -> Any:
    """Return `origin` at every position, in the form and the shapes of `rotation`."""
    parts = (rotation,) if isinstance(rotation, Tensor) else rotation
    held = tuple(first.to(part).expand_as(part).clone() for first, part in zip(origin, parts, strict=True))
    return held[0] if isinstance(rotation, Tensor) else held
