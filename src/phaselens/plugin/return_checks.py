"""Checks of what a metric's methods return. Errors say what was returned, what is expected, and where the method is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from phaselens.errors import InputError, close_matches, is_list_like
from phaselens.plugin.author_errors import author_error, describe_value, source_location
from phaselens.plugin.causal_metric import CausalMetric
from phaselens.plugin.conditions import BASELINE, Condition, ConditionGroup, ConditionKey, TaskPrompt
from phaselens.plugin.metric import Metric
from phaselens.plugin.params import Params
from phaselens.plugin.sequences import TokenSequence
from phaselens.plugin.tables import Table
from phaselens.plugin.views import Batch
from phaselens.plugin.warning import MetricWarning

Item = TypeVar("Item")


def require_definition(metric: type[Metric[Any]], params: Params) -> None:
    """Raise TypeError if `define` does not return text; an exception of `define` itself passes through."""
    definition = metric.define(params)
    if not isinstance(definition, str):
        raise author_error(
            f"define() returned {describe_value(definition)}; return one line of text",
            source_location(metric.define),
        )


def require_constructed(metric: Metric[Any]) -> None:
    """Raise TypeError if the metric's `__init__` does not call that of `Metric`, if an attribute hides a method, or
    if a property is not a number."""
    if not hasattr(metric, "warnings"):
        raise author_error(
            f"{type(metric).__name__}.__init__ does not call super().__init__(model, params, seed); create state in "
            "setup(), and leave __init__ out",
            source_location(type(metric).__init__),
        )
    for name in ("state", "load_state"):
        if not callable(getattr(metric, name)):
            raise author_error(
                f"{name} is {describe_value(getattr(metric, name))}; it is a method of Metric, which a run calls: give "
                "the attribute another name",
                source_location(type(metric)),
            )
    for name, minimum in (("sink_position", 0), ("n_distances", 1)):
        value = getattr(metric, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise author_error(
                f"{name} is {describe_value(value)}; it must be a whole number of at least {minimum}",
                _location_of(metric, name),
            )


def hook_names(metric: Metric[Any]) -> list[str]:
    """Return the names that `hooks()` returns, checked."""
    return _hook_names(metric, "hooks", metric.hooks())


def condition_hook_names(metric: CausalMetric[Any]) -> list[str]:
    """Return the names that `condition_hooks()` returns, checked."""
    return _hook_names(metric, "condition_hooks", metric.condition_hooks())


def _hook_names(metric: Metric[Any], method: str, returned: Iterable[str]) -> list[str]:
    expected = "return a list of hook names, such as ['blocks.{layer}.attn.hook_sink']"
    names = _as_list(metric, method, returned, expected)
    for name in names:
        if not isinstance(name, str):
            raise author_error(
                f"{method}() holds {describe_value(name)}; {expected}", _location_of(metric, method)
            )
    return names


def conditions_of(metric: CausalMetric[Any]) -> list[Condition]:
    """Return the metric's conditions, each checked for a distinct key, for edits, and for a control that exists.

    Raises:
        TypeError: for what is not a list of Conditions.
        InputError: for conditions that do not fit together.
    """
    returned = metric.conditions()
    expected = "return a list of Conditions; an empty one runs none"
    if isinstance(returned, Condition):
        raise author_error(
            f"conditions() returned one Condition, {returned.name!r}; return a list: [Condition(…)]",
            _location_of(metric, "conditions"),
        )
    conditions = _as_list(metric, "conditions", returned, expected)
    keys: set[ConditionKey] = {BASELINE.key}
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise author_error(
                f"conditions() holds {describe_value(condition)}; {expected}",
                _location_of(metric, "conditions"),
            )
        if condition.key in keys:
            raise _conditions_error(
                metric, f"two conditions are {condition.key}; tell them apart by name, layer, head or seed"
            )
        if not condition.edits:
            raise _conditions_error(
                metric, f"condition {condition.name!r} has no edits; the run adds the baseline itself"
            )
        keys.add(condition.key)
    _require_controls(metric, conditions)
    return conditions


def _require_controls(metric: CausalMetric[Any], conditions: Sequence[Condition]) -> None:
    """Raise InputError for a control of a condition that does not exist: its contrast would silently be missing."""
    sites_of: dict[str, dict[tuple[int | None, int | None], None]] = {}
    control_of: dict[ConditionGroup, str | None] = {}
    for condition in conditions:
        sites_of.setdefault(condition.name, {})[condition.layer, condition.head] = None
    for condition in conditions:
        target, group, site = condition.control_for, condition.group, (condition.layer, condition.head)
        if control_of.setdefault(group, target) != target:
            raise _conditions_error(
                metric,
                f"repeats of condition {condition.name!r} are controls of {control_of[group]!r} and of {target!r}; "
                "give them one control_for, or different names",
            )
        if target is None:
            continue
        if target == BASELINE.name:
            raise _conditions_error(
                metric,
                f"condition {condition.name!r}: every condition is compared with {target} anyway; leave "
                "control_for out",
            )
        if target == condition.name:
            raise _conditions_error(
                metric, f"condition {condition.name!r} is the control of itself; name another condition"
            )
        if target not in sites_of:
            candidates = sites_of.keys() - {condition.name}
            raise _conditions_error(
                metric,
                f"condition {condition.name!r}: control_for is {target!r}, which is not a condition of this metric; "
                f"{close_matches(target, candidates)}",
            )
        if site not in sites_of[target]:
            has_heads = any(head is not None for _, head in (site, *sites_of[target]))
            shared = "layer and head" if has_heads else "layer"
            sites = " and ".join(sorted(_in_words(*target_site) for target_site in sites_of[target]))
            raise _conditions_error(
                metric,
                f"condition {condition.name!r} ({_in_words(*site)}): control_for is {target!r}, which exists in "
                f"{sites} only; a condition and its control are compared within one {shared}, so give both the same "
                f"{shared}",
            )


def _conditions_error(metric: CausalMetric[Any], message: str) -> Exception:
    """Create an InputError that carries the location of the metric's `conditions`."""
    return author_error(message, _location_of(metric, "conditions"), InputError)


def _in_words(layer: int | None, head: int | None) -> str:
    words = "no layer" if layer is None else f"layer {layer}"
    return words if head is None else f"{words}, head {head}"


def prompts_of(metric: CausalMetric[Any], tokenizer: Any) -> list[TaskPrompt] | None:
    """Return the prompts that `prompts()` returns, checked; None if the metric runs on the run's texts."""
    returned = metric.prompts(tokenizer)
    if returned is None:
        return None
    expected = "return a list of TaskPrompts, or None for the run's texts"
    prompts = _as_list(metric, "prompts", returned, expected)
    for prompt in prompts:
        if not isinstance(prompt, TaskPrompt):
            raise author_error(
                f"prompts() holds {describe_value(prompt)}; {expected}", _location_of(metric, "prompts")
            )
    return prompts


def sequences_of(metric: Metric[Any], texts: Batch, tokenizer: Any) -> list[TokenSequence] | None:
    """Return the sequences that `sequences()` returns, checked; None if the metric reads the run's texts."""
    returned = metric.sequences(texts, tokenizer)
    if returned is None:
        return None
    expected = "return a list of TokenSequences, or None for the run's texts"
    sequences = _as_list(metric, "sequences", returned, expected)
    location = _location_of(metric, "sequences")
    ids: set[str] = set()
    mode_of_group: dict[str, str] = {}
    for sequence in sequences:
        if not isinstance(sequence, TokenSequence):
            raise author_error(f"sequences() holds {describe_value(sequence)}; {expected}", location)
        if sequence.id in ids:
            raise author_error(f"sequences(): two have the id {sequence.id!r}; give each its own", location)
        ids.add(sequence.id)
        if sequence.group is not None:
            mode = mode_of_group.setdefault(sequence.group, sequence.rotation_mode)
            if mode != sequence.rotation_mode:
                raise author_error(
                    f"sequences(): those of group {sequence.group!r} have the rotation modes {mode} and "
                    f"{sequence.rotation_mode}; one batch has one",
                    location,
                )
    return sequences


def tables_of(metric: Metric[Any]) -> Mapping[str, Table]:
    """Return the tables that `compute()` returns, each checked against its declaration."""
    tables = metric.compute()
    location = _location_of(metric, "compute")
    if not isinstance(tables, Mapping):
        name = metric.tables[0].name if metric.tables else "texts"
        raise author_error(
            f"compute() returned {describe_value(tables)}; return a dict of tables by name: "
            f"{{{name!r}: self.table({name!r}, rows)}}",
            location,
        )
    for name, table in tables.items():
        if not isinstance(table, Table):
            raise author_error(
                f"compute(): {name!r} is {describe_value(table)}; build it with self.table({name!r}, rows)",
                location,
            )
        if table.spec != metric.spec(name):
            raise author_error(
                f"table {name} is not as {metric.name} declares it; build it with self.table", location
            )
    return {name: _rebuilt(table) for name, table in tables.items()}


def _rebuilt(table: Table) -> Table:
    """Return a table with its cells checked again: a metric can write to the rows of a table without a check."""
    checked = table.spec.build(table.rows)
    for column, count in table.not_finite.items():
        checked.not_finite[column] = checked.not_finite.get(column, 0) + count
    return checked


def warnings_of(metric: Metric[Any]) -> list[MetricWarning]:
    """Return the warnings of a metric; raise TypeError for an attribute `warnings` that is not a list of texts."""
    warnings: object = metric.warnings
    if not isinstance(warnings, list) or not all(isinstance(warning, str) for warning in warnings):
        raise author_error(
            f"warnings is {describe_value(warnings)}; leave it to Metric, and call self.warn(message)",
            source_location(type(metric)),
        )
    return [MetricWarning(warning) for warning in warnings]


def _as_list(metric: Metric[Any], method: str, returned: Iterable[Item], expected: str) -> list[Item]:
    """Return a method's result as a list; raise TypeError for text, a mapping, or a value that is not iterable."""
    if not is_list_like(returned):
        raise author_error(
            f"{method}() returned {describe_value(returned)}; {expected}", _location_of(metric, method)
        )
    return list(returned)


def _location_of(metric: Metric[Any], name: str) -> str | None:
    """Return `file:line` of the metric's method or property of that name."""
    member = getattr(type(metric), name, None)
    return source_location(member.fget if isinstance(member, property) else member)
