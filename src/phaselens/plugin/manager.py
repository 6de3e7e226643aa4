"""Finds plugins by their entry points, and loads only those that are asked for.

A plugin is an entry point of the group `phaselens`: its name is the metric's name, its value the module
that implements the hooks. Names are thus known without importing anything, and a broken plugin hurts
nobody who does not ask for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from phaselens.errors import InputError, close_matches
from phaselens.plugin import hookspecs
from phaselens.plugin.metric import Metric, require_metric

GROUP = "phaselens"


@dataclass(frozen=True)
class Registered:
    """A plugin as its installed metadata tells it. `shadowed_by` names the distribution that has the name
    already."""

    name: str
    module: str
    distribution: str
    version: str
    shadowed_by: str | None = None

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


class Plugins:
    """All installed plugins, and those loaded so far."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("phaselens")
        self._manager.add_hookspecs(hookspecs)
        self.registered = _shadow(entry_points(group=GROUP))
        self._metrics: dict[str, type[Metric[Any]]] = {}

    @property
    def names(self) -> list[str]:
        """Names that can be asked for."""
        return [plugin.name for plugin in self.registered if plugin.shadowed_by is None]

    def origin(self, name: str) -> Registered:
        """The plugin of that name, or InputError with close matches."""
        for plugin in self.registered:
            if plugin.name == name and plugin.shadowed_by is None:
                return plugin
        raise InputError(f"no plugin {name!r}; {close_matches(name, self.names)}")

    def metric(self, name: str) -> type[Metric[Any]]:
        """The metric class of that name, imported now if it was not before. InputError names the
        distribution."""
        if name not in self._metrics:
            origin = self.origin(name)
            try:
                self._metrics[name] = self._load(origin)
            except (
                Exception,
                SystemExit,
            ) as error:  # whatever a module does when imported, it is that plugin's fault
                raise InputError(
                    f"plugin {origin} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall it"
                ) from error
        return self._metrics[name]

    def _load(self, origin: Registered) -> type[Metric[Any]]:
        module = importlib.import_module(origin.module)
        if not self._manager.is_registered(module):
            self._manager.register(module, name=origin.name)
        offered: list[Any] = []
        for answer in self._caller("phaselens_metrics", [origin.name])():
            offered.extend(answer)
        classes = [require_metric(_resolve(each), origin.module) for each in offered]
        for metric in classes:
            if metric.name == origin.name:
                return metric
        names = ", ".join(metric.name for metric in classes) or "none"
        raise LookupError(
            f"{origin.module} offers no metric of this name; its phaselens_metrics() offers {names}"
        )

    def run_finished(self, run: hookspecs.FinishedRun, names: Iterable[str]) -> list[str]:
        """Tell each plugin in `names` that `run` is over; returns a line for each that failed at it."""
        failed = []
        for name in names:
            try:
                self._caller("phaselens_run_finished", [name])(run=run)
            except Exception as error:  # noqa: BLE001 - a plugin's own failure must not take the results with it
                failed.append(f"{name}: phaselens_run_finished failed: {type(error).__name__}: {error}")
        return failed

    def _caller(self, hook: str, names: Iterable[str]) -> pluggy.HookCaller:
        wanted = [self._manager.get_plugin(name) for name in names]
        others = [plugin for plugin in self._manager.get_plugins() if plugin not in wanted]
        return self._manager.subset_hook_caller(hook, remove_plugins=others)


@functools.cache
def plugins() -> Plugins:
    """The plugins of this process."""
    return Plugins()


def _resolve(offered: Any) -> Any:
    """A class, or what the string `module:Class` points to."""
    if not isinstance(offered, str):
        return offered
    module, _, attribute = offered.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _shadow(found: Iterable[EntryPoint]) -> tuple[Registered, ...]:
    """Sorted by name; PhaseLens' own first, then by distribution: the first to have a name keeps it."""
    listed = []
    for each in found:
        distribution = each.dist.name if each.dist else "?"
        listed.append(
            Registered(each.name, each.module, distribution, each.dist.version if each.dist else "?")
        )
    listed.sort(key=lambda one: (one.name, one.distribution != GROUP, one.distribution))
    keepers: dict[str, str] = {}
    result = []
    for one in listed:
        keeper = keepers.setdefault(one.name, one.distribution)
        shadowed_by = None if keeper == one.distribution else keeper
        result.append(Registered(one.name, one.module, one.distribution, one.version, shadowed_by))
    return tuple(result)
