"""The plugins of this process: listed from their metadata, imported only when requested by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phaselens.errors import InputError, close_matches
from phaselens.plugin import hookspecs
from phaselens.plugin.author_errors import describe_error, is_of_plugin
from phaselens.plugin.metric import Metric
from phaselens.plugin.named_sources import NamedModel, NamedTexts
from phaselens.plugin.package_folder import PackageFolder
from phaselens.plugin.plugin_loading import LoadedPlugin, errors_naming
from phaselens.plugin.process_settings import preserved_settings
from phaselens.plugin.registry import PHASELENS, RegisteredPlugin, Selection, installed_plugins
from phaselens.plugin.subprocess_check import check_in_subprocesses

if TYPE_CHECKING:
    import click

Offer = TypeVar("Offer")


class Plugins:
    """All installed plugins, and those of files and folders that the user added."""

    def __init__(self) -> None:
        self.selection = Selection.from_environment()
        self.registered = installed_plugins(self.selection)
        self._added: dict[str, RegisteredPlugin] = {}
        self._added_metrics: dict[str, type[Metric[Any]]] = {}
        self._loaded: dict[str, LoadedPlugin] = {}

    @property
    def names(self) -> list[str]:
        """Names of the plugins that can be used."""
        usable = [plugin.name for plugin in self.registered if plugin.status == "ok"]
        return sorted({*usable, *self._added})

    @property
    def added_names(self) -> list[str]:
        """Names of the metrics of files and folders that were added."""
        return list(self._added)

    def origin(self, name: str) -> RegisteredPlugin:
        """Return the plugin of that name; raise InputError if there is none, or if it is disabled or failed."""
        if name in self._added:
            return self._added[name]
        candidates = [plugin for plugin in self.registered if plugin.name == name]
        for plugin in candidates:
            if plugin.status == "ok":
                return plugin
        for plugin in candidates:
            raise InputError(f"plugin {plugin} is {plugin.status}: {plugin.reason}")
        raise InputError(f"no plugin {name!r}; {close_matches(name, self.names)}")

    def add_file(self, path: str) -> list[str]:
        """Add the metrics of a file that is not installed, and return their names. They replace installed ones."""
        file = Path(path)
        if not file.is_file() or file.suffix != ".py":
            problem = "this is not a .py file" if file.exists() else "there is no such file"
            raise InputError(f"plugin file {path!r}: {problem}; name a Python file that defines a metric")
        plugin = RegisteredPlugin(file.stem, f"file {path}", "file", path)
        with errors_naming(plugin):
            loaded = LoadedPlugin.by_path(file)
            metrics = {metric.name: metric for metric in loaded.metrics() or loaded.defined_metrics()}
            if not metrics:
                raise LookupError("it defines no metric")
        for name in metrics:
            if name in self._added:
                raise InputError(
                    f"metric {name!r} is in {self._added[name].version} and in {path}; give only one"
                )
            self._added[name] = replace(plugin, name=name)
        self._loaded[plugin.module] = loaded
        self._added_metrics.update(metrics)
        return list(metrics)

    def add_folder(self, path: str) -> list[str]:
        """Add the metrics of a package folder, which need not be installed, and return their names."""
        folder = PackageFolder.read(Path(path))
        if str(folder.root) not in sys.path:
            sys.path.insert(0, str(folder.root))
        names: list[str] = []
        for name, module in folder.modules.items():
            plugin = RegisteredPlugin(name, module, "folder", path)
            with errors_naming(plugin):
                self._loaded[module] = loaded = LoadedPlugin.by_name(module)
                metrics = {metric.name: metric for metric in loaded.metrics() if metric.name == name}
                if not metrics:
                    loaded.offers(name)  # raises if it offers nothing of this name
            self._added.update(dict.fromkeys(metrics, plugin))
            self._added_metrics.update(metrics)
            names += metrics
        if not names:
            raise InputError(
                f"{path}: its plugins {', '.join(folder.modules)} are not metrics; there is nothing to check"
            )
        return names

    def metric(self, name: str) -> type[Metric[Any]]:
        """Return the metric class of that name, imported on first use. InputError names the distribution and the
        original exception."""
        if name in self._added_metrics:
            return self._added_metrics[name]
        return self._offer(name, LoadedPlugin.metric)

    def model(self, name: str) -> NamedModel | None:
        """Return the model that a plugin of that name offers, or None."""
        return self._offer(name, LoadedPlugin.model) if self._is_registered(name) else None

    def texts(self, name: str) -> NamedTexts | None:
        """Return the texts that a plugin of that name offers, or None."""
        return self._offer(name, LoadedPlugin.texts) if self._is_registered(name) else None

    def command(self, name: str) -> click.Command | None:
        """Return the command that a plugin of that name offers, or None."""
        return self._offer(name, LoadedPlugin.command) if self._is_registered(name) else None

    def notify_run_finished(self, run: hookspecs.FinishedRun, names: Iterable[str]) -> list[str]:
        """Call `phaselens_run_finished` of each plugin in `names`, and return one line per failure."""
        failures = []
        modules = {self.origin(name).module: name for name in reversed(list(names))}
        for module, name in reversed(modules.items()):
            loaded = self._loaded.get(module)
            try:
                if loaded is not None:
                    with preserved_settings():
                        loaded.call("phaselens_run_finished", run=run)
            except BaseException as error:  # the results are complete and must not be lost
                if not is_of_plugin(error):
                    raise
                failures.append(f"{name}: phaselens_run_finished failed: {describe_error(error)}")
        return failures

    def check_all(self) -> list[RegisteredPlugin]:
        """Import the plugins with status ok (third-party ones each in its own process), and return all plugins."""
        third_party = (
            plugin for plugin in self.registered if plugin.status == "ok" and plugin.distribution != PHASELENS
        )
        checked = {
            (plugin.name, plugin.distribution): plugin for plugin in check_in_subprocesses(third_party)
        }
        return [
            checked.get((plugin.name, plugin.distribution)) or self._check_built_in(plugin)
            for plugin in self.registered
        ]

    def require_working(self) -> None:
        """Raise InputError for the first plugin that failed, if PHASELENS_STRICT_PLUGINS is set."""
        if not self.selection.strict:
            return
        for plugin in self.check_all():
            if plugin.status == "failed":
                raise InputError(f"plugin {plugin} failed: {plugin.reason} (PHASELENS_STRICT_PLUGINS is set)")

    def _check_built_in(self, plugin: RegisteredPlugin) -> RegisteredPlugin:
        if plugin.status != "ok":
            return plugin
        try:
            return replace(plugin, **self._load(plugin).facts(plugin.name))
        except BaseException as error:  # shown in the list
            if not is_of_plugin(error):
                raise
            return plugin.with_status("failed", describe_error(error))

    def _is_registered(self, name: str) -> bool:
        return any(plugin.name == name for plugin in self.registered)

    def _offer(self, name: str, lookup: Callable[[LoadedPlugin, str], Offer]) -> Offer:
        plugin = self.origin(name)
        with errors_naming(plugin):
            return lookup(self._load(plugin), name)

    def _load(self, plugin: RegisteredPlugin) -> LoadedPlugin:
        if plugin.module not in self._loaded:
            self._loaded[plugin.module] = LoadedPlugin.by_name(plugin.module)
        return self._loaded[plugin.module]


@functools.cache
def plugins() -> Plugins:
    """Return the plugins of this process."""
    return Plugins()
