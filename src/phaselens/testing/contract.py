"""The contract that every metric keeps, checked on tiny models."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from phaselens.errors import InputError, require_flag, short_form
from phaselens.plugin import Metric, require_metric
from phaselens.plugin.loading import FAULTS


@dataclass(frozen=True)
class Finding:
    """What one check found. `skipped` where the metric has nothing that it could be tried on."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    traceback: str = ""


class Broken(AssertionError):  # noqa: N818 - a verdict
    """A check's verdict, in one line."""


class Skipped(Exception):  # noqa: N818 - no error
    """Why a check says nothing of this metric."""


def check_metric(
    metric: type[Metric[Any]], parameters: Mapping[str, Any] | None = None, *, allow_matrix: bool = False
) -> None:
    """Fail unless `metric` keeps the contract; for tests. `examine` says what is checked.

    Args:
        metric: the class.
        parameters: as `phaselens run` would give them; the defaults if left out.
        allow_matrix: it may read `hook_pattern` or `hook_attn_scores`, and so cost O(L²) memory.

    Raises:
        AssertionError: naming each check that failed, with what was expected and found.
        InputError: for what is no class, or no parameters.
    """
    failed = [one for one in examine(metric, parameters, allow_matrix=allow_matrix) if one.status == "failed"]
    if failed:
        lines = [f"{one.name}: {one.detail}\n{one.traceback}".rstrip() for one in failed]
        raise AssertionError(
            f"{metric.__name__} breaks {len(failed)} of its contract's terms\n" + "\n".join(lines)
        )


def examine(
    metric: type[Metric[Any]], parameters: Mapping[str, Any] | None = None, *, allow_matrix: bool = False
) -> list[Finding]:
    """Try `metric` on tiny random models (rope, nope, grouped queries, windowed, mixed) and on planted ones.

    In turn: it is a usable class; it measures the models; its tables are as declared; JSON of the run is strict;
    batch size and padding change nothing; halves merged equal the whole; state survives pickling; the same numbers
    come twice; activations are not changed; a text too short leaves nulls with a reason; uniform attention gives the
    null; memory does not grow with the square of the text.
    """
    from phaselens.testing import _checks

    if not isinstance(metric, type):
        raise InputError(
            f"expected metric as a subclass of phaselens.plugin.Metric, received {short_form(metric)}"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InputError(
            f"expected parameters as a dict from names to values, received {short_form(parameters)}"
        )
    require_flag("allow_matrix", allow_matrix)
    findings: list[Finding] = []
    usable = _found("a usable class", lambda: _usable(metric))
    findings.append(usable)
    if usable.status == "failed":
        return findings
    try:
        bench = _checks.Bench(metric, metric.Params.parse(parameters or {}), allow_matrix)
    except InputError as error:
        return [*findings, Finding("parameters", "failed", str(error))]
    for name, check in _checks.CHECKS.items():
        finding = _found(name, lambda check=check: check(bench))  # type: ignore[misc]
        findings.append(finding)
        if name == _checks.FIRST and finding.status == "failed":
            break
    return findings


def _usable(metric: type[Metric[Any]]) -> str:
    require_metric(metric, metric.__module__)
    names = [table.name for table in metric.tables]
    if not names or len(set(names)) < len(names):
        raise Broken(f"tables: expected at least one, each with a name of its own; found {names}")
    for table in metric.tables:
        columns = [column.name for column in table.columns]
        if len(set(columns)) < len(columns) or "model" in columns:
            raise Broken(
                f"table {table.name}: a column twice, or one named `model`, which the run adds: {columns}"
            )
    return f"{len(names)} tables, {len(metric.Params.specs())} parameters"


def _found(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except Broken as broken:
        first, _, rest = str(broken).partition("\n")
        return Finding(name, "failed", first, rest)
    except FAULTS as error:
        return Finding(name, "failed", f"{type(error).__name__}: {error}", traceback.format_exc())
