"""Importing one plugin and asking its hooks, each plugin by itself: nothing it does reaches another."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from phaselens.errors import InputError, is_list_like
from phaselens.plugin import hookspecs
from phaselens.plugin.metric import Metric, require_metric
from phaselens.plugin.mistakes import innermost_line, kind_of, mistake, source_of
from phaselens.plugin.offers import NamedModel, NamedTexts
from phaselens.plugin.registry import Registered
from phaselens.plugin.settings import settings_kept

if TYPE_CHECKING:
    import click

#: What a plugin may raise without taking anything with it: any exception, and `sys.exit`.
FAULTS: tuple[type[BaseException], ...] = (Exception, SystemExit)


class Loaded:
    """A plugin module that was imported and whose hooks fit their specifications."""

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
    def by_name(cls, module: str) -> Loaded:
        """Import `module` and look at its hooks."""
        return cls(importlib.import_module(module))

    @classmethod
    def by_path(cls, path: Path) -> Loaded:
        """The same for a file that is not installed. It may import files beside it, as a script may."""
        beside = str(path.resolve().parent)
        if beside not in sys.path:
            sys.path.append(beside)
        name = f"phaselens_plugin_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"plugin file {str(path)!r}: expected a .py file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return cls(module)

    def implements(self, hook: str) -> bool:
        """Whether the module has this hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """All that the hook returns, in one list."""
        offered: list[Any] = []
        for answer in getattr(self._manager.hook, hook)(**arguments):
            if not is_list_like(answer):
                raise mistake(f"{hook}() returned {kind_of(answer)}; return a list", self._place_of(hook))
            offered += answer
        return offered

    def _place_of(self, hook: str) -> str | None:
        return source_of(getattr(self.module, hook, None))

    def metrics(self) -> list[type[Metric[Any]]]:
        """The metrics it offers, as classes that are fit for use."""
        offered = [_resolve(each) for each in self.call("phaselens_metrics")]
        return [require_metric(each, self.module.__name__) for each in offered]

    def defined(self) -> list[type[Metric[Any]]]:
        """The metric classes that the module itself defines, whether or not a hook offers them."""
        name = self.module.__name__
        classes = [each for each in vars(self.module).values() if isinstance(each, type)]
        own = [each for each in classes if issubclass(each, Metric) and each.__module__ == name]
        named = [each for each in own if hasattr(each, "name")]
        # A base class of the file's own needs no name; where nothing has one, it was forgotten.
        return [require_metric(each, name) for each in named or own]

    def metric(self, name: str) -> type[Metric[Any]]:
        """The metric of that name; LookupError tells which there are."""
        return _named(self.metrics(), name, "metric", f"{self.module.__name__}'s phaselens_metrics()")

    def model(self, name: str) -> NamedModel | None:
        """The model of that name, or None."""
        found: NamedModel | None = _find(self.call("phaselens_models"), NamedModel, name)
        return found

    def texts(self, name: str) -> NamedTexts | None:
        """The set of texts of that name, or None."""
        found: NamedTexts | None = _find(self.call("phaselens_texts"), NamedTexts, name)
        return found

    def command(self, name: str) -> click.Command | None:
        """The command of that name, or None. It is registered in a group of its own, and so replaces none."""
        import click

        if not self.implements("phaselens_commands"):
            return None
        group = click.Group()
        self._manager.hook.phaselens_commands(cli=group)
        return group.commands.get(name)

    def offers(self, name: str) -> tuple[str, ...]:
        """What of this name it offers, `metric`, `model`, `texts` and `command`; LookupError where it is nothing."""
        metrics = self.metrics()
        found = {
            "metric": any(metric.name == name for metric in metrics),
            "model": self.model(name) is not None,
            "texts": self.texts(name) is not None,
            "command": self.command(name) is not None,
        }
        kinds = tuple(kind for kind, present in found.items() if present)
        if not kinds:
            _named(metrics, name, "metric, model, texts or command", f"{self.module.__name__}'s hooks")
        return kinds


@contextlib.contextmanager
def blamed(origin: Registered) -> Iterator[None]:
    """Whatever the plugin raises, `sys.exit` included, becomes an InputError that names its distribution; what it
    prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr), settings_kept():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = _place_in_plugin(error)
        where = f" ({place})" if place and place not in str(error) else ""
        raise InputError(
            f"plugin {origin} cannot be loaded: {told(error)}{where}; mend or uninstall it"
        ) from error


def _place_in_plugin(error: BaseException) -> str | None:
    """`file:line` of the innermost call outside of PhaseLens and of what imports modules."""
    named: str | None = getattr(error, "where", None)
    return named if named is not None else innermost_line(error, _is_in_plugin)


def _is_in_plugin(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    ours = package in ("phaselens", "importlib", "pluggy", "contextlib")
    return not ours and not frame.f_code.co_filename.startswith("<frozen")


def told(error: BaseException) -> str:
    """`ModuleNotFoundError: No module named 'x'`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _resolve(offered: Any) -> Any:
    """A class, or what the string `module:Class` points to."""
    if not isinstance(offered, str):
        return offered
    module, colon, attribute = offered.partition(":")
    if not (module and colon and attribute.isidentifier()):
        raise mistake(f"phaselens_metrics() offers {offered!r}; give a class, or its name as 'module:Class'")
    return getattr(importlib.import_module(module), attribute)


def _named(metrics: list[type[Metric[Any]]], name: str, kind: str, where: str) -> type[Metric[Any]]:
    for metric in metrics:
        if metric.name == name:
            return metric
    names = ", ".join(metric.name for metric in metrics) or "none"
    raise LookupError(f"it offers no {kind} of this name; {where} offers {names}")


def _find(offered: list[Any], kind: type[Any], name: str) -> Any:
    for each in offered:
        if not isinstance(each, kind):
            raise TypeError(f"{each!r} is no phaselens.plugin.{kind.__name__}")
        if each.name == name:
            return each
    return None
