"""What a metric's methods return, checked where it is returned: a mistake there is told in words, with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phaselens.errors import InputError, close_matches, is_list_like
from phaselens.plugin.causal import CausalMetric
from phaselens.plugin.conditions import BASELINE, Condition, Prompt
from phaselens.plugin.metric import Metric
from phaselens.plugin.mistakes import kind_of, mistake, source_of
from phaselens.plugin.params import Params
from phaselens.plugin.tables import Table


def require_defined(metric: type[Metric[Any]], params: Params) -> None:
    """TypeError where `define` does not give text; whatever it raises for parameters that it cannot define."""
    definition = metric.define(params)
    if not isinstance(definition, str):
        raise mistake(
            f"define() returned {kind_of(definition)}; return one line of text", source_of(metric.define)
        )


def require_constructed(metric: Metric[Any]) -> None:
    """TypeError where an `__init__` of the metric's own left out that of `Metric`, or a property is not a number."""
    if not hasattr(metric, "warnings"):
        raise mistake(
            f"{type(metric).__name__}.__init__ does not call super().__init__(model, params, seed); make state in "
            "setup(), and leave __init__ out",
            source_of(type(metric).__init__),
        )
    for name, least in (("sink_position", 0), ("n_distances", 1)):
        value = getattr(metric, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise mistake(
                f"{name} is {kind_of(value)}; it must be a whole number of at least {least}",
                _place_of(metric, name),
            )


def hook_names(metric: Metric[Any]) -> list[str]:
    """The names that `hooks()` gives."""
    given = metric.hooks()
    expected = "return a list of hook names, such as ['blocks.{layer}.attn.hook_sink']"
    names = _listed(metric, "hooks", given, expected)
    for name in names:
        if not isinstance(name, str):
            raise mistake(f"hooks() holds {kind_of(name)}; {expected}", _place_of(metric, "hooks"))
    return names


def conditions_of(metric: CausalMetric[Any]) -> list[Condition]:
    """The conditions that `conditions()` gives; each with a key of its own, edits, and a control that exists.

    Raises:
        TypeError: for what is no list of Conditions.
        InputError: for conditions that do not fit together.
    """
    given = metric.conditions()
    expected = "return a list of Conditions; an empty one runs none"
    if isinstance(given, Condition):
        raise mistake(
            f"conditions() returned one Condition, {given.name!r}; return a list: [Condition(…)]",
            _place_of(metric, "conditions"),
        )
    conditions = _listed(metric, "conditions", given, expected)
    keys: set[Any] = {BASELINE.key}
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise mistake(
                f"conditions: {condition!r} is no Condition; {expected}", _place_of(metric, "conditions")
            )
        if condition.key in keys:
            raise _unfit(
                metric, f"two conditions are {condition.key}; tell them apart by name, layer or seed"
            )
        if not condition.edits:
            raise _unfit(
                metric, f"condition {condition.name!r} has no edits; the baseline is run without asking"
            )
        keys.add(condition.key)
    _require_controls(metric, conditions)
    return conditions


def _require_controls(metric: CausalMetric[Any], conditions: Sequence[Condition]) -> None:
    """InputError for a control of nothing: its contrast would silently be missing."""
    layers_of: dict[str, set[int | None]] = {}
    control_of: dict[tuple[str, int | None], str | None] = {}
    for condition in conditions:
        layers_of.setdefault(condition.name, set()).add(condition.layer)
    for condition in conditions:
        target, place = condition.control_for, (condition.name, condition.layer)
        if control_of.setdefault(place, target) != target:
            raise _unfit(
                metric,
                f"repeats of condition {condition.name!r} are controls of {control_of[place]!r} and of {target!r}; "
                "give them one control_for, or names of their own",
            )
        if target is None:
            continue
        if target == BASELINE.name:
            raise _unfit(
                metric,
                f"condition {condition.name!r}: control_for is {target!r}, with which every condition is compared; "
                "leave control_for out",
            )
        if target == condition.name:
            raise _unfit(
                metric, f"condition {condition.name!r} is the control of itself; name another condition"
            )
        if target not in layers_of:
            others = layers_of.keys() - {condition.name}
            raise _unfit(
                metric,
                f"condition {condition.name!r}: control_for is {target!r}, which is no condition of this metric; "
                f"{close_matches(target, others)}",
            )
        if condition.layer not in layers_of[target]:
            raise _unfit(
                metric,
                f"condition {condition.name!r} ({_layer(condition.layer)}): control_for is {target!r}, which exists "
                f"in {' and '.join(sorted(_layer(layer) for layer in layers_of[target]))} only; a condition and its "
                "control are compared within one layer, so give both the same",
            )


def _unfit(metric: CausalMetric[Any], message: str) -> Exception:
    """An InputError with the place of the metric's `conditions`."""
    return mistake(message, _place_of(metric, "conditions"), InputError)


def _layer(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"


def prompts_of(metric: CausalMetric[Any], tokenizer: Any) -> list[Prompt] | None:
    """The prompts that `prompts()` gives; None where the metric runs on the run's texts."""
    given = metric.prompts(tokenizer)
    if given is None:
        return None
    expected = "return a list of Prompts, or None for the run's texts"
    prompts = _listed(metric, "prompts", given, expected)
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise mistake(f"prompts() holds {kind_of(prompt)}; {expected}", _place_of(metric, "prompts"))
    return prompts


def tables_of(metric: Metric[Any]) -> Mapping[str, Table]:
    """The tables that `compute()` gives, each as the metric declares it."""
    tables = metric.compute()
    where = _place_of(metric, "compute")
    if not isinstance(tables, Mapping):
        name = metric.tables[0].name if metric.tables else "texts"
        raise mistake(
            f"compute() returned {kind_of(tables)}; return a dict of tables by name: "
            f"{{{name!r}: self.table({name!r}, rows)}}",
            where,
        )
    for name, table in tables.items():
        if not isinstance(table, Table):
            raise mistake(
                f"compute(): {name!r} is {kind_of(table)}; make it by self.table({name!r}, rows)", where
            )
        if table.spec != metric.spec(name):
            raise mistake(f"table {name} is not as {metric.name} declares it; build it by self.table", where)
    return tables


def _listed(metric: Metric[Any], method: str, given: Any, expected: str) -> list[Any]:
    """What a method returned as a list; TypeError for text, a mapping, and what cannot be iterated over."""
    if not is_list_like(given):
        raise mistake(f"{method}() returned {kind_of(given)}; {expected}", _place_of(metric, method))
    return list(given)


def _place_of(metric: Metric[Any], name: str) -> str | None:
    """Where the metric's method or property of that name is written."""
    member = getattr(type(metric), name, None)
    return source_of(member.fget if isinstance(member, property) else member)
