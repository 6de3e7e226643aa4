"""Make DroPE checkpoints loadable through the plain transformers and TransformerLens entry points.

`import phaselens` must do this, since `AutoConfig` looks a `model_type` up before any other code of PhaseLens runs; yet
it must not import transformers, which takes seconds. So each registration waits for the module that it concerns: it
runs at once if that is imported already, otherwise when it is imported. Even then only names are registered: the
classes derive from Llama's and Qwen2's, whose modules may be only partly imported at that moment.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# model_type → its class in phaselens.lens.drope.
_CONFIGS = {"llama_drope": "DroPELlamaConfig", "qwen2_drope": "DroPEQwen2Config"}
_MODELS = {"llama_drope": "DroPELlamaModel", "qwen2_drope": "DroPEQwen2Model"}
_ADAPTERS = {
    "DroPELlamaForCausalLM": "DroPELlamaArchitectureAdapter",
    "DroPEQwen2ForCausalLM": "DroPEQwen2ArchitectureAdapter",
}
_CAUSAL_LMS = {"llama_drope": "DroPELlamaForCausalLM", "qwen2_drope": "DroPEQwen2ForCausalLM"}


class _LazyModule:
    """A placeholder for `phaselens.lens.drope` that imports it when a class is looked up in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module("phaselens.lens.drope"), name)


class _ImportFinder(MetaPathFinder):
    """Runs the import of a module inside a context, which is given the module.

    wrapt calls a function after an import, but it imports asyncio for it, which would double the cost of `import
    phaselens`.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[ModuleType], AbstractContextManager[None]]] = {}

    def call_after(self, name: str, hook: Callable[[ModuleType], None]) -> None:
        """Call `hook` now if the module is imported already, else when it is imported."""
        if name in sys.modules:
            hook(sys.modules[name])
            return

        @contextmanager
        def context(module: ModuleType) -> Iterator[None]:
            yield
            hook(module)

        self._waiting[name] = context

    def surround(self, name: str, context: Callable[[ModuleType], AbstractContextManager[None]]) -> None:
        """Execute the module inside the context, unless it is imported already."""
        if name not in sys.modules:
            self._waiting[name] = context

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders return, with a loader that runs inside the context."""
        # Popped, so that the lookup below does not recurse into this finder.
        context = self._waiting.pop(fullname, None)
        if context is None:
            return None
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            self._waiting[fullname] = context
            return None
        execute = spec.loader.exec_module

        def execute_inside(module: ModuleType) -> None:
            with context(module):
                execute(module)

        spec.loader.exec_module = execute_inside  # type: ignore[method-assign]
        return spec


_FINDER = _ImportFinder()


def register_when_imported() -> None:
    """Schedule the three registrations; cheap, and safe to call again."""
    _FINDER.surround("transformers.cache_utils", _without_hqq)
    _FINDER.surround("transformers.quantizers.quantizer_torchao", _without_log_lines)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for module, hook in (
        ("transformers.models.auto.configuration_auto", _register_configs),
        ("transformers.models.auto.modeling_auto", _register_models),
        ("transformer_lens.factories.architecture_adapter_factory", _register_adapters),
    ):
        _FINDER.call_after(module, hook)


@contextmanager
def _without_log_lines(_module: ModuleType) -> Iterator[None]:
    """Keep what torchao logs on import off stderr, where a command has its own lines: which kernels it lacks."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)


@contextmanager
def _without_hqq(_module: ModuleType) -> Iterator[None]:
    """Give transformers' caches a quantizer that imports hqq when it is used.

    Where hqq is installed, its import loads torch's compiler, which takes as long as torch itself.
    """
    name = "hqq.core.quantize"
    if name in sys.modules:
        yield
        return
    placeholder = ModuleType(name)
    vars(placeholder)["Quantizer"] = _LazyQuantizer()
    sys.modules[name] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
        package = sys.modules.get("hqq.core")
        if package is not None and vars(package).get("quantize") is placeholder:
            del vars(package)["quantize"]


class _LazyQuantizer:
    """A placeholder for hqq's `Quantizer` that imports it when an attribute of it is looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module("hqq.core.quantize").Quantizer, name)


# transformers' own `register` takes classes, not names; its mappings resolve names in the module stored beside them.
def _register_configs(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING_NAMES.update(_CONFIGS)
    for model_type in _CONFIGS:
        auto.CONFIG_MAPPING._modules[model_type] = _LazyModule()


def _register_models(auto: ModuleType) -> None:
    for mapping, names in ((auto.MODEL_MAPPING, _MODELS), (auto.MODEL_FOR_CAUSAL_LM_MAPPING, _CAUSAL_LMS)):
        mapping._model_mapping.update(names)
        for model_type, config in _CONFIGS.items():
            mapping._reverse_config_mapping[config] = model_type
            mapping._modules[model_type] = _LazyModule()


def _register_adapters(factory: ModuleType) -> None:
    for architecture, adapter in _ADAPTERS.items():
        factory.ArchitectureAdapterFactory.register_adapter(architecture, _lazy_adapter(adapter))
        # boot_transformers reads this table; the factory's own is a copy of it, made on import.
        factory.SUPPORTED_ARCHITECTURES[architecture] = _lazy_adapter(adapter)


def register_adapter(architecture: str, adapter: Callable[[Any], Any]) -> None:
    """Make models of the class `architecture` loadable by a TransformerLens adapter built from their configuration."""
    factory = import_module("transformer_lens.factories.architecture_adapter_factory")
    factory.ArchitectureAdapterFactory.register_adapter(architecture, adapter)
    factory.SUPPORTED_ARCHITECTURES[architecture] = adapter


def _lazy_adapter(name: str) -> Callable[[object], object]:
    """Return a function that imports the adapter class when TransformerLens builds an adapter."""

    def build(config: object) -> object:
        return getattr(import_module("phaselens.lens.adapters"), name)(config)

    return build
