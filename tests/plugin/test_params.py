"""Parameters convert, keep their bounds, and say what they take."""

from dataclasses import dataclass

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Params, param


@dataclass(frozen=True)
class Mine(Params):
    threshold: float = param(0.3, help="a bound", unit="share", minimum=0, maximum=1)
    position: int = param(0, help="a place", minimum=0)
    both: bool = param(False, help="a switch")
    order: str = param("first", help="a choice", choices=("first", "last"))
    layer: int | None = param(None, help="a layer, or none for all", minimum=0)


def test_defaults_are_what_the_class_says() -> None:
    assert Mine().as_dict() == {
        "threshold": 0.3,
        "position": 0,
        "both": False,
        "order": "first",
        "layer": None,
    }


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("threshold", "0.5", 0.5),
        ("threshold", 1, 1.0),
        ("position", "7", 7),
        ("both", "yes", True),
        ("both", "False", False),
        ("order", "last", "last"),
        ("layer", "none", None),
        ("layer", "3", 3),
        ("layer", None, None),
    ],
)
def test_text_and_values_become_the_declared_type(name: str, given: object, expected: object) -> None:
    value = Mine.parse({name: given}).as_dict()[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "takes"),
    [
        ("threshold", "1.1", "a number, 0 to 1"),
        ("threshold", "nan", "a number, 0 to 1"),
        ("threshold", "inf", "a number, 0 to 1"),
        ("threshold", True, "a number, 0 to 1"),
        ("threshold", "much", "a number, 0 to 1"),
        ("position", "-1", "a whole number, 0 or more"),
        ("position", "1.5", "a whole number, 0 or more"),
        ("position", 1.5, "a whole number, 0 or more"),
        ("both", "perhaps", "true or false"),
        ("order", "middle", "first or last"),
        ("layer", "-2", "a whole number or none, 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name: str, given: object, takes: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*; it takes {takes}$"):
        Mine.parse({name: given})


def test_an_unknown_name_gets_close_matches() -> None:
    with pytest.raises(InputError, match=r"no parameter 'treshold'; did you mean threshold\?"):
        Mine.parse({"treshold": 1})


def test_bounds_hold_for_the_constructor_too() -> None:
    with pytest.raises(InputError, match="position is -1"):
        Mine(position=-1)


def test_a_flag_is_the_name_with_dashes() -> None:
    @dataclass(frozen=True)
    class Other(Params):
        sink_position: int = param(0, help="a place")

    assert [spec.flag for spec in Other.specs()] == ["--sink-position"]


def test_a_field_without_param_or_of_another_type_is_the_authors_error() -> None:
    @dataclass(frozen=True)
    class Bare(Params):
        threshold: float = 0.3

    @dataclass(frozen=True)
    class Odd(Params):
        names: list = param((), help="names")  # type: ignore[type-arg] # noqa: RUF009

    for wrong in (Bare, Odd):
        with pytest.raises(TypeError, match=r"a parameter is an int, float, bool or str"):
            wrong.specs()
