"""Selection of the result table: the one that `--table` names, or a default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from phaselens.errors import InputError, close_matches
from phaselens.plugin import Metric, Params


def find_table(declared: Mapping[str, Sequence[str]], name: str) -> tuple[str, str]:
    """Resolve `NAME` or `METRIC.NAME` to (metric, table), among the tables that each metric declares.

    >>> find_table({"sinks": ["texts", "layers"]}, "layers")
    ('sinks', 'layers')
    """
    metric, dot, table = name.rpartition(".")
    if dot and metric not in declared:
        raise InputError(f"--table {name}: {metric!r} is not in this run; {close_matches(metric, declared)}")
    owners = [owner for owner, tables in declared.items() if table in tables and metric in ("", owner)]
    if not owners:
        names = {table for tables in declared.values() for table in tables}
        raise InputError(f"no table {name!r}; {close_matches(table, names)}")
    if len(owners) > 1:
        raise InputError(f"{', '.join(owners)} each have a table {name!r}; write --table {owners[0]}.{name}")
    return owners[0], table


def default_table(metrics: Iterable[type[Metric[Params]]]) -> str:
    """Return the table to write if none is named: `layers`, else the table that the first metric displays."""
    chosen = list(metrics)
    names = {spec.name for metric in chosen for spec in metric.tables}
    if "layers" in names or not chosen:
        return "layers"
    first_metric = chosen[0]
    return first_metric.display.table if first_metric.display is not None else first_metric.tables[0].name
