"""Make DroPE checkpoints loadable through the plain transformers and TransformerLens entry points.

`import phaselens` must do this, since `AutoConfig` looks a `model_type` up before anything else of ours runs; yet
it must not pay for importing transformers, which takes seconds. So each registration waits for the module that it
concerns: at once where that is imported already, otherwise at the moment it is. Even then only names are registered:
the classes derive from Llama's and Qwen2's, whose modules may at that moment be half imported themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# model_type: its classes in phaselens.lens.drope.
_CONFIGS = {"llama_drope": "DroPELlamaConfig", "qwen2_drope": "DroPEQwen2Config"}
_MODELS = {"llama_drope": "DroPELlamaModel", "qwen2_drope": "DroPEQwen2Model"}
_ADAPTERS = {
    "DroPELlamaForCausalLM": "DroPELlamaArchitectureAdapter",
    "DroPEQwen2ForCausalLM": "DroPEQwen2ArchitectureAdapter",
}
_CAUSAL_LMS = {"llama_drope": "DroPELlamaForCausalLM", "qwen2_drope": "DroPEQwen2ForCausalLM"}


class _WhenAsked:
    """Stands for `phaselens.lens.drope`, and imports it when a class is looked up in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module("phaselens.lens.drope"), name)


class _AfterImport(MetaPathFinder):
    """Calls a function with a module as soon as that was imported. (wrapt does the same, and imports asyncio for
    it: half of what `import phaselens` costs.)"""

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[Any], None]] = {}

    def add(self, name: str, hook: Callable[[Any], None]) -> None:
        """Call `hook` now if the module is there, else when it is."""
        if name in sys.modules:
            hook(sys.modules[name])
        else:
            self._waiting[name] = hook

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that calls the hook at its end."""
        hook = self._waiting.pop(fullname, None)  # and so this finder is not asked for it a second time
        if hook is None:
            return None
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            self._waiting[fullname] = hook
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


_FINDER = _AfterImport()


def register_when_imported() -> None:
    """Arrange the three registrations; cheap, and safe to call again."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for module, hook in (
        ("transformers.models.auto.configuration_auto", _register_configs),
        ("transformers.models.auto.modeling_auto", _register_models),
        ("transformer_lens.factories.architecture_adapter_factory", _register_adapters),
    ):
        _FINDER.add(module, hook)


# transformers' own `register` takes classes, not names; its mappings resolve names in the module kept beside them.
def _register_configs(auto: Any) -> None:
    auto.CONFIG_MAPPING_NAMES.update(_CONFIGS)
    for model_type in _CONFIGS:
        auto.CONFIG_MAPPING._modules[model_type] = _WhenAsked()


def _register_models(auto: Any) -> None:
    for mapping, names in ((auto.MODEL_MAPPING, _MODELS), (auto.MODEL_FOR_CAUSAL_LM_MAPPING, _CAUSAL_LMS)):
        mapping._model_mapping.update(names)
        for model_type, config in _CONFIGS.items():
            mapping._reverse_config_mapping[config] = model_type
            mapping._modules[model_type] = _WhenAsked()


def _register_adapters(factory: Any) -> None:
    for architecture, adapter in _ADAPTERS.items():
        factory.ArchitectureAdapterFactory.register_adapter(architecture, _built_when_asked(adapter))
        # boot_transformers asks this table; the factory's own is a copy of it, made on import.
        factory.SUPPORTED_ARCHITECTURES[architecture] = _built_when_asked(adapter)


def register_adapter(architecture: str, adapter: Callable[[Any], Any]) -> None:
    """Make models whose class is called `architecture` loadable, by a TransformerLens adapter made from their
    configuration."""
    factory: Any = import_module("transformer_lens.factories.architecture_adapter_factory")
    factory.ArchitectureAdapterFactory.register_adapter(architecture, adapter)
    factory.SUPPORTED_ARCHITECTURES[architecture] = adapter


def _built_when_asked(name: str) -> Callable[[Any], Any]:
    def build(cfg: Any) -> Any:
        return getattr(import_module("phaselens.lens.adapters"), name)(cfg)

    return build
