"""Installed plugins as their metadata describes them: names, distributions, versions. No plugin is imported here.

A plugin is an entry point of the group `phaselens`. Its name is the name of what it offers (a metric, a model, a set of
texts, a command); its value is the module that implements the hooks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, distributions, entry_points, version
from typing import Literal

from phaselens.plugin.author_errors import describe_error

GROUP = "phaselens"
#: The distribution of the built-in plugins.
PHASELENS = "phaselens"

Status = Literal["ok", "disabled", "shadowed", "failed"]


@dataclass(frozen=True)
class RegisteredPlugin:
    """A plugin as its installed metadata describes it.

    `status` is `ok`, `disabled` (by the environment), `shadowed` (another distribution has a plugin of that name) or
    `failed`; `reason` says why it is not ok. Known once it has been imported: `offers` names what it offers, and of
    a metric, `kind` (observational, causal or task) and `measures` (one line).
    """

    name: str
    module: str
    distribution: str
    version: str
    status: Status = "ok"
    reason: str = ""
    offers: tuple[str, ...] = ()
    kind: str = ""
    measures: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"

    def with_status(self, status: Status, reason: str) -> RegisteredPlugin:
        """Return a copy of the plugin with a status other than ok."""
        return replace(self, status=status, reason=reason)

    def as_dict(self) -> dict[str, object]:
        """Return the plugin as plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "distribution": self.distribution,
            "version": self.version,
            "module": self.module,
            "offers": list(self.offers),
            "kind": self.kind,
            "measures": self.measures,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Selection:
    """The plugins that the environment allows, by plugin name or by distribution name.

    `only` is None where all are allowed. With `strict`, a plugin that fails is an error for every command.
    """

    only: frozenset[str] | None = None
    disabled: frozenset[str] = frozenset()
    strict: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Selection:
        """Read `PHASELENS_PLUGINS`, `PHASELENS_DISABLE_PLUGINS` and `PHASELENS_STRICT_PLUGINS`."""
        only = environment.get("PHASELENS_PLUGINS")
        return cls(
            None if only is None else _split(only),
            _split(environment.get("PHASELENS_DISABLE_PLUGINS", "")),
            environment.get("PHASELENS_STRICT_PLUGINS", "") not in ("", "0"),
        )

    def reason_disabled(self, plugin: RegisteredPlugin) -> str:
        """Return why `plugin` is disabled; empty if it is not."""
        names = {plugin.name, plugin.distribution}
        if names & self.disabled:
            return "named in PHASELENS_DISABLE_PLUGINS"
        if self.only is not None and not names & self.only:
            return "not named in PHASELENS_PLUGINS"
        return ""


def _split(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def installed_plugins(selection: Selection) -> tuple[RegisteredPlugin, ...]:
    """Return all installed plugins, by name. Of several with one name, PhaseLens' own is ok, else the first one."""
    listed = [_read_entry_point(entry_point) for entry_point in _entry_points()]
    listed.sort(key=lambda plugin: (plugin.name, plugin.distribution != PHASELENS, plugin.distribution))
    owners: dict[str, RegisteredPlugin] = {}
    plugins = []
    for plugin in listed:
        reason = selection.reason_disabled(plugin)
        if reason:
            plugin = plugin.with_status("disabled", reason)
        elif plugin.status == "ok":
            owner = owners.setdefault(plugin.name, plugin)
            if owner.distribution != plugin.distribution:
                plugin = plugin.with_status(
                    "shadowed", f"{owner.distribution} {owner.version} has a plugin of this name"
                )
        plugins.append(plugin)
    installed_names = {name for plugin in listed for name in (plugin.name, plugin.distribution)}
    for name in sorted((selection.only or frozenset()) - installed_names):
        reason = "named in PHASELENS_PLUGINS, but not installed"
        plugins.append(RegisteredPlugin(name, "", "?", "?", "failed", reason))
    return tuple(plugins)


def _entry_points() -> Iterable[EntryPoint]:
    """Return the group's entry points. Distributions are read one by one if the metadata of one cannot be read."""
    try:
        return list(entry_points(group=GROUP))
    except Exception:  # noqa: BLE001 - importlib.metadata raises whatever a broken file causes
        readable: list[EntryPoint] = []
        for distribution in distributions():
            try:
                readable += [point for point in distribution.entry_points if point.group == GROUP]
            except Exception:  # noqa: BLE001, S112 - its plugins cannot even be named
                continue
        return readable


def _read_entry_point(entry_point: EntryPoint) -> RegisteredPlugin:
    """Return the plugin of an entry point, failed if the metadata of its distribution cannot be read."""
    try:
        return _described(entry_point)
    except Exception as error:  # noqa: BLE001 - importlib.metadata raises whatever a broken file causes
        plugin = RegisteredPlugin(entry_point.name, entry_point.value, "?", "?")
        return plugin.with_status(
            "failed", f"the metadata of its distribution cannot be read: {describe_error(error)}"
        )


def _described(entry_point: EntryPoint) -> RegisteredPlugin:
    name = getattr(entry_point.dist, "name", None) or "?"
    version_number = getattr(entry_point.dist, "version", None) or "?"
    plugin = RegisteredPlugin(entry_point.name, entry_point.value, name, version_number)
    if not all(part.isidentifier() for part in entry_point.value.split(".")):
        return plugin.with_status("failed", f"its entry point does not name a module: {entry_point.value!r}")
    if name == PHASELENS or entry_point.dist is None:
        return plugin
    problem = _requirement_problem(entry_point.dist.requires or [])
    return plugin.with_status("failed", problem) if problem else plugin


def _requirement_problem(requirements: Iterable[str]) -> str:
    """Return the requirement on PhaseLens' version that is not met, in words; empty if all are met."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"its requirement {text!r} cannot be read: {str(error).splitlines()[0]}"
        if canonicalize_name(requirement.name) != PHASELENS or (
            requirement.marker and not requirement.marker.evaluate()
        ):
            continue
        installed = version(PHASELENS)
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"it needs phaselens{requirement.specifier}; this is {installed}"
    return ""
