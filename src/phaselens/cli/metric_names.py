"""Names of metrics on the command line, among them words for groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from phaselens.cli.shared_options import split_names
from phaselens.plugin import plugins

#: Words for the installed metrics of a kind, or for those of every kind.
GROUPS = ("all", "observational", "causal", "task")


def metrics_named(values: Iterable[str]) -> list[str]:
    """Split names given by repeated options or separated by commas, write out groups, and drop repetitions.

    >>> metrics_named(["sinks,bos-v", "sinks"])
    ['sinks', 'bos-v']
    >>> "sinks" in metrics_named(["observational"]), "sinks" in metrics_named(["causal"])
    (True, False)
    """
    return list(dict.fromkeys(member for name in split_names(values) for member in _members(name)))


def _members(name: str) -> Sequence[str]:
    """Return the metrics of a group; a name that is no group, or that a plugin has, is itself.

    A plugin that cannot be imported is in no group. A group has none of the metrics that only supply details to
    reports.
    """
    if name not in GROUPS or name in plugins().names:
        return [name]
    members = [
        plugin.name
        for plugin in plugins().check_all()
        if plugin.status == "ok" and "metric" in plugin.offers and name in ("all", plugin.kind)
    ]
    return [member for member in members if plugins().metric(member).prints]
