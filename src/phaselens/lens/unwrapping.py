"""The modules of a model before it is wrapped, to which it can be restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from phaselens.lens.score_attention import implementations_of, set_implementations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ModuleState:
    """One module's class and attributes; ``contents`` are those of the attributes that are dictionaries."""

    module: nn.Module
    module_class: type
    attributes: Mapping[str, Any]
    contents: Mapping[str, dict[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """Note the state of a module."""
        attributes = dict(vars(module))
        contents = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
        return cls(module, type(module), attributes, contents)

    def restore(self) -> None:
        """Give the module its class and attributes back; dictionaries stay the same objects, to which handles of
        hooks refer."""
        self.module.__class__ = self.module_class
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for name, content in self.contents.items():
            self.attributes[name].clear()
            self.attributes[name].update(content)


@dataclass(frozen=True, eq=False)
class Unwrapped:
    """A model's modules with their classes, children and hooks, and its attention implementations.

    Weights are shared with the model: wrapping changes none.
    """

    model: PreTrainedModel
    states: tuple[ModuleState, ...]
    implementations: Mapping[int, str | None]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Unwrapped:
        """Note the state of a model."""
        return cls(model, tuple(map(ModuleState.of, model.modules())), implementations_of(model))

    def restore(self) -> None:
        """Put every module back where it was, and undo what was added to it."""
        for state in self.states:
            state.restore()
        set_implementations(self.model, self.implementations)
