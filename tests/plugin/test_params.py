"""Parameters convert values, enforce their bounds, and name the values that they accept."""

from dataclasses import dataclass

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Params, param


@dataclass(frozen=True)
class Example(Params):
    threshold: float = param(0.3, help="a bound", unit="share", minimum=0, maximum=1)
    position: int = param(0, help="a place", minimum=0)
    include_last: bool = param(False, help="a switch")
    order: str = param("first", help="a choice", choices=("first", "last"))
    layer: int | None = param(None, help="a layer, or none for all", minimum=0)


def test_defaults_are_those_of_the_class() -> None:
    assert Example().as_dict() == {
        "threshold": 0.3,
        "position": 0,
        "include_last": False,
        "order": "first",
        "layer": None,
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("threshold", "0.5", 0.5),
        ("threshold", 1, 1.0),
        ("position", "7", 7),
        ("include_last", "yes", True),
        ("include_last", "False", False),
        ("order", "last", "last"),
        ("layer", "none", None),
        ("layer", "3", 3),
        ("layer", None, None),
    ],
)
def test_text_and_values_become_the_declared_type(name: str, value: object, expected: object) -> None:
    converted = Example.parse({name: value}).as_dict()[name]
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("threshold", "1.1", "a number, 0 to 1"),
        ("threshold", "nan", "a number, 0 to 1"),
        ("threshold", "inf", "a number, 0 to 1"),
        ("threshold", True, "a number, 0 to 1"),
        ("threshold", "much", "a number, 0 to 1"),
        ("position", "-1", "a whole number, 0 or more"),
        ("position", "1.5", "a whole number, 0 or more"),
        ("position", 1.5, "a whole number, 0 or more"),
        ("include_last", "perhaps", "true or false"),
        ("order", "middle", "first or last"),
        ("layer", "-2", "a whole number or none, 0 or more"),
    ],
)
def test_the_error_for_a_wrong_value_says_what_to_give(name: str, value: object, accepted: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*; give {accepted}$"):
        Example.parse({name: value})


def test_an_unknown_name_gets_close_matches() -> None:
    with pytest.raises(InputError, match=r"no parameter 'treshold'; did you mean threshold\?"):
        Example.parse({"treshold": 1})


def test_bounds_hold_for_the_constructor_too() -> None:
    with pytest.raises(InputError, match="position is -1"):
        Example(position=-1)


def test_a_flag_is_the_name_with_dashes() -> None:
    @dataclass(frozen=True)
    class Other(Params):
        sink_position: int = param(0, help="a place")

    assert [spec.flag for spec in Other.specs()] == ["--sink-position"]


def test_a_field_without_param_or_of_another_type_is_the_authors_error() -> None:
    @dataclass(frozen=True)
    class PlainField(Params):
        threshold: float = 0.3

    @dataclass(frozen=True)
    class Odd(Params):
        names: list = param((), help="names")  # type: ignore[type-arg] # noqa: RUF009

    for params_class in (PlainField, Odd):
        with pytest.raises(TypeError, match=r"a parameter is an int, float, bool or str"):
            params_class.specs()
