"""Parameters of a metric: typed, bounded, with units and help. Flags and documentation are generated from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from phaselens.errors import LARGEST_WHOLE, InputError, close_matches, is_number, is_whole, short_form

_KEY = "phaselens"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def param(
    default: Any,
    *,
    help: str,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare a field of a `Params` class. Bounds are inclusive; `unit` is shown in help and docs.

    Raises:
        TypeError: for an argument of another type, and for bounds between which no value lies.
    """
    if not isinstance(help, str):
        raise TypeError(f"param(help={help!r}): give text")
    if choices is not None and not (
        isinstance(choices, tuple | list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise TypeError(f"param(choices={choices!r}): give a tuple of strings")
    if unit is not None and not isinstance(unit, str):
        raise TypeError(f"param(unit={unit!r}): give text, or None")
    for name, bound in (("minimum", minimum), ("maximum", maximum)):
        if bound is not None and not is_number(bound):
            raise TypeError(f"param({name}={bound!r}): give a number, or None")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise TypeError(f"param(minimum={minimum}, maximum={maximum}): no value lies between them")
    declaration = {"help": help, "unit": unit, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata={_KEY: declaration})


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter: name, type, default, bounds, unit and help."""

    name: str
    type: type
    optional: bool
    default: object
    help: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """The command-line flag: `sink_position` → `--sink-position`."""
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """The accepted values in words: `a number, 0 to 1`."""
        if self.choices:
            return " or ".join(self.choices)
        type_name = _TYPE_NAMES[self.type] + (" or none" if self.optional else "")
        if self.minimum is not None and self.maximum is not None:
            return f"{type_name}, {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{type_name}, {self.minimum:g} or more"
        if self.maximum is not None:
            return f"{type_name}, {self.maximum:g} or less"
        return type_name

    def convert(self, value: object) -> object:
        """Convert `value` (command-line text or a Python value) to the parameter's type, or raise InputError."""
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", ""))):
            return None
        converted = _from_text(self.type, value) if isinstance(value, str) else _from_python(self.type, value)
        if converted is None or not self._fits(converted):
            raise InputError(f"{self.name} is {short_form(value)}; give {self.allowed}")
        return converted

    def _fits(self, value: object) -> bool:
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
                return False
            reaches_minimum = self.minimum is None or value >= self.minimum
            return reaches_minimum and (self.maximum is None or value <= self.maximum)
        return True


def _from_text(value_type: type, text: str) -> object:
    """Convert command-line text to `value_type`; return None if it is not of that type."""
    if value_type is str:
        return text
    if value_type is bool:
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    try:
        return value_type(text)
    except ValueError:
        return None


def _from_python(value_type: type, value: object) -> object:
    """Return `value` if it has the type (an int is accepted as a float), else None."""
    if isinstance(value, bool) and value_type is not bool:
        return None
    if value_type is float and is_number(value):
        return math.inf if is_whole(value) and abs(value) > LARGEST_WHOLE else float(value)
    if value_type is int and is_whole(value):
        return int(value)
    return value if isinstance(value, value_type) else None


@dataclass(frozen=True)
class Params:
    """Base class of a metric's parameters. Subclass it as a frozen dataclass whose fields are made by `param`.

    >>> @dataclass(frozen=True)
    ... class SinkParams(Params):
    ...     threshold: float = param(0.3, help="a head at or over it is a sink", minimum=0, maximum=1)
    >>> SinkParams.parse({"threshold": "0.5"})
    SinkParams(threshold=0.5)
    """

    def __post_init__(self) -> None:
        for spec in self.specs():
            object.__setattr__(self, spec.name, spec.convert(getattr(self, spec.name)))

    @classmethod
    @functools.cache
    def specs(cls) -> tuple[ParamSpec, ...]:
        """Return all parameters, in the order of the class body."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for owner in cls.__mro__:
            for name, value in vars(owner).items():
                # @dataclass replaces its fields by their defaults; a remaining Field would be ignored.
                if isinstance(value, dataclasses.Field) and name not in fields:
                    raise TypeError(
                        f"{owner.__name__}.{name} is not a parameter: put @dataclass(frozen=True) above class "
                        f"{owner.__name__}, and a type after {name}"
                    )
        hints = typing.get_type_hints(cls)
        return tuple(_spec(cls, field, hints[field.name]) for field in dataclasses.fields(cls))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Create parameters from names and values; text is converted. InputError lists close matches for a typo."""
        if not isinstance(values, Mapping):
            raise InputError(f"parameters are {short_form(values)}; give a dict from names to values")
        names = [spec.name for spec in cls.specs()]
        for name in values:
            if name not in names:
                raise InputError(f"no parameter {short_form(name)}; {close_matches(name, names)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, as plain Python values."""
        return dataclasses.asdict(self)


def _spec(owner: type, field: dataclasses.Field[Any], hint: object) -> ParamSpec:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    types_allowed = [member for member in members if member is not types.NoneType]
    if _KEY not in field.metadata or len(types_allowed) != 1 or types_allowed[0] not in _TYPE_NAMES:
        raise TypeError(
            f"{owner.__name__}.{field.name}: a parameter is an int, float, bool or str "
            "(or one of them | None) with `= param(default, help=…)`"
        )
    return ParamSpec(field.name, types_allowed[0], len(members) > 1, field.default, **field.metadata[_KEY])
