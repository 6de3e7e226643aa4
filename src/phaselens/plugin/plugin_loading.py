"""Import one plugin and call its hooks. Each plugin has its own pluggy manager, so that one cannot affect another."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from phaselens.errors import InputError, is_list_like
from phaselens.plugin import hookspecs
from phaselens.plugin.author_errors import (
    author_error,
    describe_error,
    describe_value,
    innermost_location,
    message_of,
    source_location,
)
from phaselens.plugin.causal_metric import kind_of
from phaselens.plugin.metric import Metric, require_metric
from phaselens.plugin.named_sources import NamedModel, NamedTexts
from phaselens.plugin.process_settings import preserved_settings
from phaselens.plugin.registry import RegisteredPlugin

if TYPE_CHECKING:
    import click

NamedSource = TypeVar("NamedSource", NamedModel, NamedTexts)


class LoadedPlugin:
    """An imported plugin module whose hooks match their specifications."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._manager = pluggy.PluginManager("phaselens")
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(module)
        self._manager.check_pending()
        for name in vars(hookspecs):
            if name.startswith("phaselens_") and hasattr(module, name) and not self.implements(name):
                raise LookupError(f"{module.__name__} defines {name} without @hookimpl")

    @classmethod
    def by_name(cls, module: str) -> LoadedPlugin:
        """Import `module` and check its hooks."""
        return cls(importlib.import_module(module))

    @classmethod
    def by_path(cls, path: Path) -> LoadedPlugin:
        """Import a file that is not installed. It may import files in its folder, as a script may."""
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        name = f"phaselens_plugin_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"plugin file {str(path)!r}: expected a .py file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return cls(module)

    def implements(self, hook: str) -> bool:
        """Return whether the module implements this hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def call(self, hook: str, **arguments: object) -> list[Any]:
        """Call a hook, and return everything that its implementations return in one list."""
        results: list[Any] = []
        for offers in getattr(self._manager.hook, hook)(**arguments):
            if not is_list_like(offers):
                location = source_location(getattr(self.module, hook, None))
                raise author_error(f"{hook}() returned {describe_value(offers)}; return a list", location)
            results += offers
        return results

    def metrics(self) -> list[type[Metric[Any]]]:
        """Return the metric classes that the plugin offers, each checked."""
        candidates = [_resolve(offer) for offer in self.call("phaselens_metrics")]
        return [require_metric(candidate, self.module.__name__) for candidate in candidates]

    def defined_metrics(self) -> list[type[Metric[Any]]]:
        """Return the metric classes that the module itself defines, whether or not a hook offers them."""
        module = self.module.__name__
        classes = [value for value in vars(self.module).values() if isinstance(value, type)]
        metrics = [
            candidate
            for candidate in classes
            if issubclass(candidate, Metric) and candidate.__module__ == module
        ]
        named = [metric for metric in metrics if hasattr(metric, "name")]
        # A base class in the file needs no name; if no class has one, the name was forgotten.
        return [require_metric(metric, module) for metric in named or metrics]

    def metric(self, name: str) -> type[Metric[Any]]:
        """Return the metric of that name; LookupError lists the names that exist."""
        metrics = self.metrics()
        for metric in metrics:
            if metric.name == name:
                return metric
        raise self._not_offered_error(metrics, "metric", "phaselens_metrics()")

    def model(self, name: str) -> NamedModel | None:
        """Return the model of that name, or None."""
        return _find_source(self.call("phaselens_models"), NamedModel, name)

    def texts(self, name: str) -> NamedTexts | None:
        """Return the set of texts of that name, or None."""
        return _find_source(self.call("phaselens_texts"), NamedTexts, name)

    def command(self, name: str) -> click.Command | None:
        """Return the command of that name, or None. It is registered in a separate group, so it replaces no other."""
        import click

        if not self.implements("phaselens_commands"):
            return None
        group = click.Group()
        self._manager.hook.phaselens_commands(cli=group)
        return group.commands.get(name)

    def facts(self, name: str) -> dict[str, Any]:
        """Return what the plugin offers under this name, and what its metric measures, as fields of RegisteredPlugin.

        Raises:
            LookupError: if it offers nothing of this name.
        """
        facts: dict[str, Any] = {"offers": self.offers(name)}
        if "metric" in facts["offers"]:
            metric = self.metric(name)
            measures = " ".join(str(metric.description or metric.title).split())
            facts |= {"kind": kind_of(metric), "measures": measures}
        return facts

    def offers(self, name: str) -> tuple[str, ...]:
        """Return the kinds of offers under this name: `metric`, `model`, `texts`, `command`; LookupError for none."""
        metrics = self.metrics()
        is_offered = {
            "metric": any(metric.name == name for metric in metrics),
            "model": self.model(name) is not None,
            "texts": self.texts(name) is not None,
            "command": self.command(name) is not None,
        }
        offers = tuple(offer for offer, present in is_offered.items() if present)
        if not offers:
            raise self._not_offered_error(metrics, "metric, model, texts or command", "hooks")
        return offers

    def _not_offered_error(self, metrics: list[type[Metric[Any]]], missing: str, source: str) -> LookupError:
        names = ", ".join(metric.name for metric in metrics) or "none"
        return LookupError(
            f"it offers no {missing} of this name; {self.module.__name__}'s {source} offers {names}"
        )


@contextlib.contextmanager
def errors_naming(plugin: RegisteredPlugin) -> Iterator[None]:
    """Convert any exception of the plugin, `sys.exit` included, to an InputError that names its distribution; redirect
    what it prints to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr), preserved_settings():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        location = _location_in_plugin(error)
        suffix = f" ({location})" if location and location not in message_of(error) else ""
        raise InputError(
            f"plugin {plugin} cannot be loaded: {describe_error(error)}{suffix}; fix or uninstall it"
        ) from error


def _location_in_plugin(error: BaseException) -> str | None:
    """Return `file:line` of the innermost call outside of PhaseLens and of the modules that import plugins."""
    location: str | None = getattr(error, "location", None)
    return location if location is not None else innermost_location(error, _is_in_plugin)


def _is_in_plugin(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    is_importer = package in ("phaselens", "importlib", "pluggy", "contextlib")
    return not is_importer and not frame.f_code.co_filename.startswith("<frozen")


def _resolve(offer: object) -> object:
    """Return the offered class, or the class that the string `module:Class` names."""
    if not isinstance(offer, str):
        return offer
    module, colon, attribute = offer.partition(":")
    if not (module and colon and attribute.isidentifier()):
        raise author_error(
            f"phaselens_metrics() offers {offer!r}; give a class, or its name as 'module:Class'"
        )
    return getattr(importlib.import_module(module), attribute)


def _find_source(offers: list[Any], source_class: type[NamedSource], name: str) -> NamedSource | None:
    for offer in offers:
        if not isinstance(offer, source_class):
            raise TypeError(f"{offer!r} is not a phaselens.plugin.{source_class.__name__}")
        if offer.name == name:
            return offer
    return None
