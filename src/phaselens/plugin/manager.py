"""The plugins of this process: known by their metadata, loaded only when asked for by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches
from phaselens.plugin import hookspecs
from phaselens.plugin.folders import PackageFolder
from phaselens.plugin.loading import FAULTS, Loaded, blamed, told
from phaselens.plugin.metric import Metric
from phaselens.plugin.offers import NamedModel, NamedTexts
from phaselens.plugin.probe import Probes
from phaselens.plugin.registry import OWN, Registered, Selection, installed
from phaselens.plugin.settings import settings_kept

if TYPE_CHECKING:
    import click


class Plugins:
    """All installed plugins, those of files given for once, and which of them are loaded."""

    def __init__(self) -> None:
        self.selection = Selection.of()
        self.registered = installed(self.selection)
        self._files: dict[str, Registered] = {}
        self._in_files: dict[str, type[Metric[Any]]] = {}
        self._loaded: dict[str, Loaded] = {}

    @property
    def names(self) -> list[str]:
        """Names that can be asked for."""
        usable = [plugin.name for plugin in self.registered if plugin.status == "ok"]
        return sorted({*usable, *self._files})

    def origin(self, name: str) -> Registered:
        """The plugin of that name; InputError where there is none, or where it is disabled or failed."""
        if name in self._files:
            return self._files[name]
        named = [plugin for plugin in self.registered if plugin.name == name]
        for plugin in named:
            if plugin.status == "ok":
                return plugin
        for plugin in named:
            raise InputError(f"plugin {plugin} is {plugin.status}: {plugin.reason}")
        raise InputError(f"no plugin {name!r}; {close_matches(name, self.names)}")

    def add_file(self, path: str) -> list[str]:
        """Take the metrics of a file that is not installed; returns their names. They go before installed ones."""
        place = Path(path)
        if not place.is_file() or place.suffix != ".py":
            problem = "this is no .py file" if place.exists() else "there is no such file"
            raise InputError(f"plugin file {path!r}: {problem}; name a Python file that defines a metric")
        origin = Registered(place.stem, f"file {path}", "file", path)
        with blamed(origin):
            loaded = Loaded.by_path(place)
            found = {metric.name: metric for metric in loaded.metrics() or loaded.defined()}
            if not found:
                raise LookupError("it defines no metric")
        for name in found:
            if name in self._files:
                raise InputError(f"metric {name!r} is in {self._files[name].version} and in {path}; give one")
            self._files[name] = replace(origin, name=name)
        self._loaded[origin.module] = loaded
        self._in_files.update(found)
        return list(found)

    def add_folder(self, path: str) -> list[str]:
        """Take the metrics of a package's folder that need not be installed; returns their names."""
        folder = PackageFolder.read(Path(path))
        if str(folder.root) not in sys.path:
            sys.path.insert(0, str(folder.root))
        names: list[str] = []
        for name, module in folder.modules.items():
            origin = Registered(name, module, "folder", path)
            with blamed(origin):
                self._loaded[module] = loaded = Loaded.by_name(module)
                found = {metric.name: metric for metric in loaded.metrics() if metric.name == name}
                if not found:
                    loaded.offers(name)  # complains where it offers nothing at all of this name
            self._files.update(dict.fromkeys(found, origin))
            self._in_files.update(found)
            names += found
        if not names:
            raise InputError(
                f"{path}: its plugins {', '.join(folder.modules)} are no metrics; there is nothing to check"
            )
        return names

    def metric(self, name: str) -> type[Metric[Any]]:
        """The metric class of that name, imported now if it was not before. InputError names the
        distribution and the original exception."""
        if name in self._in_files:
            return self._in_files[name]
        origin = self.origin(name)
        with blamed(origin):
            return self._load(origin).metric(name)

    def model(self, name: str) -> NamedModel | None:
        """The model that a plugin of that name offers, if there is one."""
        if not self._is_known(name):
            return None
        origin = self.origin(name)
        with blamed(origin):
            return self._load(origin).model(name)

    def texts(self, name: str) -> NamedTexts | None:
        """The texts that a plugin of that name offers, if there is one."""
        if not self._is_known(name):
            return None
        origin = self.origin(name)
        with blamed(origin):
            return self._load(origin).texts(name)

    def command(self, name: str) -> click.Command | None:
        """The command that a plugin of that name offers, if there is one."""
        if not self._is_known(name):
            return None
        origin = self.origin(name)
        with blamed(origin):
            return self._load(origin).command(name)

    def run_finished(self, run: hookspecs.FinishedRun, names: Iterable[str]) -> list[str]:
        """Tell each plugin in `names` that `run` is over; returns a line for each that failed at it."""
        failed = []
        modules = {self.origin(name).module: name for name in reversed(list(names))}
        for module, name in reversed(modules.items()):
            loaded = self._loaded.get(module)
            try:
                if loaded is not None:
                    with settings_kept():
                        loaded.call("phaselens_run_finished", run=run)
            except FAULTS as error:  # its own failure must not take the results with it
                failed.append(f"{name}: phaselens_run_finished failed: {told(error)}")
        return failed

    def look(self) -> list[Registered]:
        """All plugins, those that should work after trying: PhaseLens' own here, others each in its own process."""
        with self.probe() as probes:
            tried = {(one.name, one.distribution): one for one in probes.results()}
        return [tried.get((one.name, one.distribution)) or self._tried(one) for one in self.registered]

    def probe(self, besides: Iterable[str] = ()) -> Probes:
        """Start trying all others' plugins, but those in `besides`, each in its own process."""
        left_out = set(besides)
        return Probes(
            one
            for one in self.registered
            if one.status == "ok" and one.distribution != OWN and one.name not in left_out
        )

    def require_sound(self) -> None:
        """InputError for the first plugin that failed, where the environment asks for strictness."""
        if not self.selection.strict:
            return
        for one in self.look():
            if one.status == "failed":
                raise InputError(f"plugin {one} failed: {one.reason} (PHASELENS_STRICT_PLUGINS is set)")

    def _tried(self, one: Registered) -> Registered:
        if one.status != "ok" or one.distribution != OWN:
            return one
        try:
            return replace(one, offers=self._load(one).offers(one.name))
        except FAULTS as error:  # shown in the list
            return one.without("failed", told(error))

    def _is_known(self, name: str) -> bool:
        return any(plugin.name == name for plugin in self.registered)

    def _load(self, origin: Registered) -> Loaded:
        if origin.module not in self._loaded:
            self._loaded[origin.module] = Loaded.by_name(origin.module)
        return self._loaded[origin.module]


@functools.cache
def plugins() -> Plugins:
    """The plugins of this process."""
    return Plugins()
