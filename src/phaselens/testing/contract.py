"""Check on tiny models that a metric keeps the contract of all metrics."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from phaselens.errors import InputError, require_flag, short_form
from phaselens.plugin import Metric, require_metric
from phaselens.plugin.author_errors import is_of_plugin
from phaselens.testing._checks import CHECKS, FIRST_CHECK, MetricUnderTest
from phaselens.testing.findings import Broken, Finding, Skipped


def check_metric(
    metric: type[Metric[Any]], parameters: Mapping[str, Any] | None = None, *, allow_matrix: bool = False
) -> None:
    """Fail unless `metric` keeps the contract; for use in tests. `examine` lists the checks.

    Args:
        metric: the class.
        parameters: by name, as for `phaselens run`; the defaults if left out.
        allow_matrix: the metric may read `hook_pattern` or `hook_attn_scores`, and so cost O(L²) memory.

    Raises:
        AssertionError: names each check that failed, with what was expected and what was found.
        InputError: for something other than a class, or for unusable parameters.
    """
    failed = [
        finding
        for finding in examine(metric, parameters, allow_matrix=allow_matrix)
        if finding.status == "failed"
    ]
    if failed:
        lines = [f"{finding.name}: {finding.detail}\n{finding.traceback}".rstrip() for finding in failed]
        raise AssertionError(
            f"{metric.__name__} fails {len(failed)} checks of the contract\n" + "\n".join(lines)
        )


def examine(
    metric: type[Metric[Any]], parameters: Mapping[str, Any] | None = None, *, allow_matrix: bool = False
) -> list[Finding]:
    """Check `metric` on tiny random models (rope, nope, grouped queries, windowed, mixed) and on planted ones.

    The checks, in order: it is a usable class; it measures the models; its tables are as declared; JSON of the run is
    strict; batch size and padding have no effect; halves merged equal the whole; state survives a file; two runs give
    the same numbers; activations are not changed; missing values for a short text have a reason; uniform attention
    gives the null; memory does not grow with the square of the text's length.

    Raises:
        InputError: unless metric is a class and parameters are a mapping.
    """
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
    usability = _run_check("a usable class", lambda: _usable(metric))
    findings.append(usability)
    if usability.status == "failed":
        return findings
    try:
        subject = MetricUnderTest(metric, metric.Params.parse(parameters or {}), allow_matrix)
    except InputError as error:
        return [*findings, Finding("parameters", "failed", str(error))]
    for name, check in CHECKS.items():
        finding = _run_check(name, lambda check=check: check(subject))  # type: ignore[misc]
        findings.append(finding)
        if name == FIRST_CHECK and finding.status == "failed":
            break
    return findings


def _usable(metric: type[Metric[Any]]) -> str:
    require_metric(metric, metric.__module__)
    names = [table.name for table in metric.tables]
    if not names or len(set(names)) < len(names):
        raise Broken(f"tables: expected at least one, each with a distinct name; found {names}")
    for table in metric.tables:
        columns = [column.name for column in table.columns]
        if len(set(columns)) < len(columns) or "model" in columns:
            raise Broken(
                f"table {table.name}: its columns {columns} have a duplicate, or the name `model`, which the run adds"
            )
    return f"{len(names)} tables, {len(metric.Params.specs())} parameters"


def _run_check(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except Broken as failure:
        detail, _, traceback_text = str(failure).partition("\n")
        return Finding(name, "failed", detail, traceback_text)
    except BaseException as error:
        if not is_of_plugin(error):
            raise
        return Finding(name, "failed", f"{type(error).__name__}: {error}", traceback.format_exc())
