"""States as trees of plain values: what they may hold, what is refused, and what changed between two."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from phaselens.errors import InputError
from phaselens.plugin import Metric, MetricWarning, NestedState, Params, PerText, Table, TableSpec
from phaselens.plugin.states import changes, overlaid, plain_copy, restored, same_value
from phaselens.testing import model_info


class Range(NamedTuple):
    """A pair with names."""

    low: float
    high: float


@dataclass(frozen=True)
class Totals:
    """A frozen dataclass with a cached property."""

    count: int
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def double(self) -> int:
        return 2 * self.count


class Collecting(Metric[Params]):
    """A metric with one attribute, which a test sets."""

    name = "collecting"
    version = "1"
    tables = (TableSpec("texts", ()),)

    def setup(self) -> None:
        self.held: Any = None
        self.by_word: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))

    def hooks(self) -> list[str]:
        return []

    def update(self, layer: object) -> None:
        return

    def compute(self) -> Mapping[str, Table]:
        return {}


def collecting(held: Any = None) -> Collecting:
    metric = Collecting(model_info(), Params())
    metric.held = held
    return metric


PLAIN_VALUES = [
    None,
    True,
    -0.0,
    float("nan"),
    float("-inf"),
    2**80,
    "a \ud800 b",
    [1, (2.5, None), {"x": {3: {("a", None, 0): [1]}}}],
    {1, 2},
    frozenset({"a", ("b", 1)}),
    Range(0.5, float("nan")),
    Totals(3, {"x": np.arange(3.0)}),
    MetricWarning("few", "code"),
    np.zeros((0, 3), dtype=np.float32),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(["one", ""]),
    np.float32(0.1),
    np.array(1 + 2j),
    torch.arange(6.0).view(2, 3).T,
    torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    torch.tensor(True),
]


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=lambda value: type(value).__name__)
def test_a_plain_value_is_copied_unchanged(value: Any) -> None:
    copied = plain_copy(value, "it")
    assert same_value(copied, value)
    assert same_value(restored(copied), value)


@pytest.mark.parametrize("generator", [random.Random(3), np.random.default_rng(3), torch.Generator()])
def test_a_random_generator_continues_where_it_was(generator: Any) -> None:
    draw = {
        random.Random: lambda source: source.random(),
        np.random.Generator: lambda source: source.random(),
        torch.Generator: lambda source: float(torch.rand(1, generator=source)),
    }[type(generator)]
    draw(generator)
    copied = plain_copy(generator, "it")
    assert same_value(copied, generator)
    assert draw(restored(copied)) == draw(restored(copied)) == draw(generator)
    assert not same_value(copied, generator)


def test_a_copy_does_not_change_with_the_original() -> None:
    array, inner = np.zeros(2), [1]
    copied = plain_copy({"array": array, "inner": inner}, "it")
    array[0], inner[0] = 5.0, 5
    assert copied["array"].tolist() == [0.0, 0.0]
    assert copied["inner"] == [1]


class Plain:
    """An object of no kind that a state can hold."""


@dataclass
class WithMore:
    """A dataclass to which code adds an attribute."""

    count: int = 0


def with_more() -> WithMore:
    instance = WithMore()
    vars(instance)["extra"] = 1
    return instance


def cyclic() -> list[Any]:
    values: list[Any] = []
    values.append({"again": values})
    return values


def local_class() -> Any:
    @dataclass
    class Local:
        count: int = 0

    return Local()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (lambda: 0, "Collecting.held is a function, which a state cannot hold; keep values such as"),
        ({"x": [Plain()]}, "Collecting.held['x'][0] is a Plain"),
        ({Plain: 1}, "Collecting.held has the key <class"),
        (np.array([object()]), "Collecting.held is an array of object"),
        (torch.zeros(2).to_sparse(), "Collecting.held is a tensor on cpu (torch.sparse_coo)"),
        (torch.zeros(2, device="meta"), "Collecting.held is a tensor on meta"),
        (cyclic(), "Collecting.held[0]['again'] contains itself"),
        (with_more(), "Collecting.held has an attribute 'extra' that is not one of its fields"),
        (local_class(), "local_class.<locals>.Local, which is not at the top level of the module"),
        (Plain, "Collecting.held is the class Plain"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_cannot_be_stored_is_an_error_that_names_the_attribute(value: Any, problem: str) -> None:
    with pytest.raises(TypeError) as caught:
        collecting(value).state()
    assert problem in str(caught.value)


def test_a_state_leaves_out_what_a_new_instance_is_given() -> None:
    assert set(collecting().state()) == {"per_text", "warnings", "held", "by_word"}


def test_a_metric_gets_its_attributes_back_and_a_nested_defaultdict_its_factories() -> None:
    metric = collecting(Totals(2))
    metric.by_word["to"][3] += 1
    metric.warn("few", "code")
    twin = collecting()
    twin.load_state(metric.state())
    assert twin.held == Totals(2)
    twin.by_word["to"][4] += 1
    twin.by_word["be"][0] += 1
    assert twin.by_word == {"to": {3: 1, 4: 1}, "be": {0: 1}}
    assert twin.warnings == ["few"]
    assert twin.warnings[0].code == "code"
    assert metric.by_word == {"to": {3: 1}}


def test_getstate_leaves_attributes_out_and_setstate_receives_all() -> None:
    class Trimmed(Collecting):
        def __getstate__(self) -> dict[str, Any]:
            return {"held": self.held}

        def __setstate__(self, attributes: dict[str, Any]) -> None:
            vars(self).update(attributes, made_again=True)

    metric = Trimmed(model_info(), Params())
    metric.held = 4
    twin = Trimmed(model_info(), Params())
    twin.load_state(metric.state())
    assert (twin.held, vars(twin)["made_again"]) == (4, True)


def test_an_object_with_a_state_restores_itself() -> None:
    class Holding(Collecting):
        def setup(self) -> None:
            super().setup()
            self.inner = [collecting(), PerText()]

    metric = Holding(model_info(), Params())
    metric.inner[0].held = Counter("aab")  # type: ignore[union-attr]
    tree = metric.state()
    assert isinstance(tree["inner"][0], NestedState)
    twin = Holding(model_info(), Params())
    inner = twin.inner[0]
    twin.load_state(tree)
    assert twin.inner[0] is inner
    assert inner.held == {"a": 2, "b": 1}  # type: ignore[union-attr]


def test_a_nested_state_without_its_object_is_refused() -> None:
    with pytest.raises(InputError, match="expected template as a Stateful"):
        collecting().load_state({"held": NestedState(x=1)})


def test_changes_hold_what_differs_and_restore_the_whole() -> None:
    base = NestedState(a=1, b=NestedState(x=np.zeros(2), y=2), c={"k": [1]})
    state = NestedState(a=1, b=NestedState(x=np.zeros(2), y=3), c={"k": [1], "new": 0}, d=None)
    changed = changes(state, base)
    assert changed == {"b": {"y": 3}, "c": {"k": [1], "new": 0}, "d": None}
    assert same_value(overlaid(base, changed), state)
    assert changes(base, base) == {}


@pytest.mark.parametrize(
    ("value", "twin"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (True, 1),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.zeros(1), np.zeros(1, np.float32)),
    ],
)
def test_values_that_compare_equal_may_differ_in_a_state(value: Any, twin: Any) -> None:
    assert same_value(value, value)
    assert not same_value(value, twin)
