"""What the installed metadata says of plugins: names, distributions, versions. No plugin is imported here.

A plugin is an entry point of the group `phaselens`. Its name is the name of all it offers (a metric, a model, a set of
texts, a command); its value is the module that implements the hooks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, distributions, entry_points, version
from typing import Literal

GROUP = "phaselens"
OWN = "phaselens"

Status = Literal["ok", "disabled", "shadowed", "failed"]


@dataclass(frozen=True)
class Registered:
    """A plugin as its installed metadata tells it.

    `status` is `ok`, `disabled` (by the environment), `shadowed` (another distribution has the name already) or
    `failed`; `reason` says why it is not ok, and `offers` what it was found to offer, where anybody looked.
    """

    name: str
    module: str
    distribution: str
    version: str
    status: Status = "ok"
    reason: str = ""
    offers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"

    def without(self, status: Status, reason: str) -> Registered:
        """The same plugin, not to be used."""
        return replace(self, status=status, reason=reason)

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "distribution": self.distribution,
            "version": self.version,
            "module": self.module,
            "offers": list(self.offers),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Selection:
    """Which plugins the environment allows: by plugin name or by distribution name.

    `only` is None where all are allowed. `strict` makes a plugin that fails an error for everybody.
    """

    only: frozenset[str] | None = None
    disabled: frozenset[str] = frozenset()
    strict: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Selection:
        """From `PHASELENS_PLUGINS`, `PHASELENS_DISABLE_PLUGINS` and `PHASELENS_STRICT_PLUGINS`."""
        only = environment.get("PHASELENS_PLUGINS")
        return cls(
            None if only is None else _names(only),
            _names(environment.get("PHASELENS_DISABLE_PLUGINS", "")),
            environment.get("PHASELENS_STRICT_PLUGINS", "") not in ("", "0"),
        )

    def objection(self, one: Registered) -> str:
        """Why `one` is disabled, or nothing."""
        own = {one.name, one.distribution}
        if own & self.disabled:
            return "named in PHASELENS_DISABLE_PLUGINS"
        if self.only is not None and not own & self.only:
            return "not named in PHASELENS_PLUGINS"
        return ""


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def installed(selection: Selection) -> tuple[Registered, ...]:
    """All plugins, by name. Of several of one name PhaseLens' own keeps it, else the first distribution by name."""
    listed = [_registered(each) for each in _entry_points()]
    listed.sort(key=lambda one: (one.name, one.distribution != OWN, one.distribution))
    keepers: dict[str, Registered] = {}
    result = []
    for one in listed:
        objection = selection.objection(one)
        if objection:
            one = one.without("disabled", objection)
        elif one.status == "ok":
            keeper = keepers.setdefault(one.name, one)
            if keeper.distribution != one.distribution:
                one = one.without("shadowed", f"{keeper.distribution} {keeper.version} has the name")
        result.append(one)
    named = {name for one in listed for name in (one.name, one.distribution)}
    for name in sorted((selection.only or frozenset()) - named):
        result.append(
            Registered(name, "", "?", "?", "failed", "named in PHASELENS_PLUGINS, but not installed")
        )
    return tuple(result)


def _entry_points() -> Iterable[EntryPoint]:
    """One distribution's unreadable metadata spoils the quick way; then each is read by itself."""
    try:
        return list(entry_points(group=GROUP))
    except Exception:  # noqa: BLE001 - importlib.metadata raises whatever a broken file makes it stumble over
        found: list[EntryPoint] = []
        for distribution in distributions():
            try:
                found += [each for each in distribution.entry_points if each.group == GROUP]
            except Exception:  # noqa: BLE001, S112 - nothing is known of plugins whose metadata cannot be read
                continue
        return found


def _registered(point: EntryPoint) -> Registered:
    distribution = getattr(point.dist, "name", None) or "?"
    number = getattr(point.dist, "version", None) or "?"
    one = Registered(point.name, point.value, distribution, number)
    if not all(part.isidentifier() for part in point.value.split(".")):
        return one.without("failed", f"its entry point names no module: {point.value!r}")
    unmet = "" if distribution == OWN or point.dist is None else _unmet(point.dist.requires or [])
    return one.without("failed", unmet) if unmet else one


def _unmet(requirements: Iterable[str]) -> str:
    """What a distribution asks of PhaseLens' version and does not get, or nothing."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"its requirement {text!r} cannot be read: {str(error).splitlines()[0]}"
        if canonicalize_name(requirement.name) != OWN or (
            requirement.marker and not requirement.marker.evaluate()
        ):
            continue
        here = version(OWN)
        if not requirement.specifier.contains(here, prereleases=True):
            return f"it needs phaselens{requirement.specifier}; this is {here}"
    return ""
