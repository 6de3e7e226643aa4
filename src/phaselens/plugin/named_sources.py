"""Models and texts that a plugin offers by name, besides metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phaselens.data import Text


@dataclass(frozen=True)
class NamedModel:
    """A model that `phaselens run NAME` accepts.

    `load()` returns what `phaselens.load` accepts: a checkpoint folder or a hub id, a Hugging Face causal LM, or a pair
    of such a model and its tokenizer. For an architecture that the lens does not support, `adapters` maps the name of
    the model's class to a TransformerLens `ArchitectureAdapter` (the class, or a function of its configuration).
    """

    name: str
    load: Callable[[], Any]
    help: str = ""
    adapters: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_fields(self, "load", self.load)
        if not isinstance(self.adapters, Mapping):
            raise TypeError(
                f"NamedModel {self.name!r}: adapters is {self.adapters!r}; give a dict from class names to adapters"
            )


@dataclass(frozen=True)
class NamedTexts:
    """Texts that `--texts NAME` accepts; `read()` returns strings, or `Text`s with their own ids."""

    name: str
    read: Callable[[], Iterable[str | Text]]
    help: str = ""

    def __post_init__(self) -> None:
        _require_fields(self, "read", self.read)


def _require_fields(source: NamedModel | NamedTexts, method: str, function: object) -> None:
    class_name, name = type(source).__name__, source.name
    if not isinstance(name, str) or not name:
        raise TypeError(f"{class_name}: its name is {name!r}; give text")
    if not callable(function):
        raise TypeError(f"{class_name} {name!r}: {method} is {function!r}; give a function without arguments")
    if not isinstance(source.help, str):
        raise TypeError(f"{class_name} {name!r}: help is {source.help!r}; give text")
