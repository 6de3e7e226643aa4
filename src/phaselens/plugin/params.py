"""Parameters of a metric: typed, bounded, with units and help; they become command-line flags and docs."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from phaselens.errors import InputError, close_matches, is_number

_KEY = "phaselens"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def param(
    default: Any,
    *,
    help: str,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of a `Params` class. Bounds are inclusive; `unit` is shown in help and docs."""
    if not isinstance(help, str):
        raise TypeError(f"param(help={help!r}): give text")
    if choices is not None and not (
        isinstance(choices, tuple | list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise TypeError(f"param(choices={choices!r}): give a tuple of texts")
    if unit is not None and not isinstance(unit, str):
        raise TypeError(f"param(unit={unit!r}): give text, or None")
    for name, bound in (("minimum", minimum), ("maximum", maximum)):
        if bound is not None and not is_number(bound):
            raise TypeError(f"param({name}={bound!r}): give a number, or None")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise TypeError(f"param(minimum={minimum}, maximum={maximum}): nothing lies between them")
    limits = {"help": help, "unit": unit, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata={_KEY: limits})


@dataclass(frozen=True)
class ParamSpec:
    """One parameter as a person needs to know it."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """The command-line spelling: `sink_position` → `--sink-position`."""
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What it accepts, in words: `a number, 0 to 1`."""
        if self.choices:
            return " or ".join(self.choices)
        kind = _PLAIN[self.type] + (" or none" if self.optional else "")
        if self.minimum is not None and self.maximum is not None:
            return f"{kind}, {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{kind}, {self.minimum:g} or more"
        if self.maximum is not None:
            return f"{kind}, {self.maximum:g} or less"
        return kind

    def convert(self, value: Any) -> Any:
        """`value` (text from a command line, or a Python value) as this parameter's type, or InputError."""
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", ""))):
            return None
        converted = _from_text(self.type, value) if isinstance(value, str) else _from_python(self.type, value)
        if converted is None or not self._fits(converted):
            raise InputError(f"{self.name} is {value!r}; it takes {self.allowed}")
        return converted

    def _fits(self, value: Any) -> bool:
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, int | float) and not isinstance(value, bool):
            above = self.minimum is None or value >= self.minimum
            return above and (self.maximum is None or value <= self.maximum)
        return True


def _from_text(kind: type, text: str) -> Any:
    """The value that `text` spells, or None where it spells none."""
    if kind is str:
        return text
    if kind is bool:
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    try:
        return kind(text)
    except ValueError:
        return None


def _from_python(kind: type, value: Any) -> Any:
    """`value` if it is of the type (an int passes for a float), or None."""
    if isinstance(value, bool) and kind is not bool:
        return None
    if kind is float and isinstance(value, int):
        return float(value)
    return value if isinstance(value, kind) else None


@dataclass(frozen=True)
class Params:
    """Base of a metric's parameters; subclass it as a frozen dataclass whose fields are made by `param`.

    >>> @dataclass(frozen=True)
    ... class Mine(Params):
    ...     threshold: float = param(0.3, help="at or over it a head is a sink", minimum=0, maximum=1)
    >>> Mine.parse({"threshold": "0.5"})
    Mine(threshold=0.5)
    """

    def __post_init__(self) -> None:
        for spec in self.specs():
            object.__setattr__(self, spec.name, spec.convert(getattr(self, spec.name)))

    @classmethod
    @functools.cache
    def specs(cls) -> tuple[ParamSpec, ...]:
        """All parameters, in the order in which the class names them."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for owner in cls.__mro__:
            for name, value in vars(owner).items():
                # What @dataclass has seen it replaces by the default; what is still a field would be ignored.
                if isinstance(value, dataclasses.Field) and name not in fields:
                    raise TypeError(
                        f"{owner.__name__}.{name} is no parameter: put @dataclass(frozen=True) over class "
                        f"{owner.__name__}, and a type behind {name}"
                    )
        hints = typing.get_type_hints(cls)
        return tuple(_spec(cls, field, hints[field.name]) for field in dataclasses.fields(cls))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Parameters from names and values (texts are converted), or InputError with close matches."""
        if not isinstance(values, Mapping):
            raise InputError(f"parameters are {values!r}; give a dict from names to values")
        known = [spec.name for spec in cls.specs()]
        for name in values:
            if name not in known:
                raise InputError(f"no parameter {name!r}; {close_matches(name, known)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Names and values, plain."""
        return dataclasses.asdict(self)


def _spec(owner: type, field: dataclasses.Field[Any], hint: Any) -> ParamSpec:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not types.NoneType]
    if _KEY not in field.metadata or len(kinds) != 1 or kinds[0] not in _PLAIN:
        raise TypeError(
            f"{owner.__name__}.{field.name}: a parameter is an int, float, bool or str "
            "(or one of them | None) with `= param(default, help=…)`"
        )
    return ParamSpec(field.name, kinds[0], len(members) > 1, field.default, **field.metadata[_KEY])
