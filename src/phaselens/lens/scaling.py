"""Overrides of a model's attention scale and of its rope type, as they are written. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from phaselens.errors import InputError, is_number, short_form

ROPE_TYPES = ("linear", "dynamic", "yarn")
"""transformers' rope types that need no more than a factor."""


@dataclass(frozen=True)
class RopeScaling:
    """A rope type and its factor.

    >>> RopeScaling.parse("yarn:4"), str(RopeScaling("linear", 2.5))
    (RopeScaling(rope_type='yarn', factor=4.0), 'linear:2.5')
    """

    rope_type: str
    factor: float

    @classmethod
    def parse(cls, text: object) -> RopeScaling:
        """Parse `TYPE:FACTOR`; InputError for another type, and for a factor below 1."""
        rope_type, colon, number = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not colon or rope_type not in ROPE_TYPES or not 1 <= factor < float("inf"):
            forms = ", ".join(f"{name}:FACTOR" for name in ROPE_TYPES[:-1])
            raise InputError(
                f"rope_scaling is {short_form(text)}; write {forms} or {ROPE_TYPES[-1]}:FACTOR, with a factor of 1 or "
                "more"
            )
        return cls(rope_type, factor)

    def __str__(self) -> str:
        return f"{self.rope_type}:{self.factor:g}"


def require_softmax_scale(scale: object) -> None:
    """Raise InputError unless `scale` is None or a positive number."""
    if scale is None or (is_number(scale) and 0 < float(scale) < float("inf")):
        return
    raise InputError(
        f"softmax_scale is {short_form(scale)}; give the factor of q·k, a number above 0 such as 0.125, or leave it out"
    )
