"""Errors of a plugin's author state what was given, what is expected, and the location in the author's file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import (
    CausalMetric,
    Column,
    Condition,
    Display,
    Edit,
    LayerView,
    Metric,
    NamedModel,
    Params,
    TableSpec,
    TaskPrompt,
    param,
    require_metric,
)
from tests.runs.conditions import causal, zero
from tests.runs.metrics import Probe, probe
from tests.toys import letters, toy_lens

TEXTS = [letters(5), letters(3)]
HERE = re.escape(__file__)
OFF = zero("blocks.0.hook_mlp_out", 0)


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


def using(use: Callable[[Any, LayerView], Any]) -> type[Probe]:
    """Return a metric whose update does one thing."""

    def update(self: Probe, layer: LayerView) -> None:
        use(self, layer)

    return probe(update=update)


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda self: value


def having(**methods: Any) -> type[Probe]:
    """Return a metric whose named methods return these values."""
    return probe(**{name: constant(value) for name, value in methods.items()})


def with_cell(value: Any) -> type[Probe]:
    return probe(compute=lambda self: {"summary": self.table("summary", [(value,)])})


def with_row(value: Any) -> type[Probe]:
    return probe(compute=lambda self: {"summary": self.table("summary", [value])})


def without_super(self: Any, *arguments: Any) -> None:
    self.model = arguments[0]


def raising(self: Any) -> Any:
    yield OFF
    raise ZeroDivisionError("its own")


POINT = "blocks.{layer}.hook_resid_post"

MISTAKES: list[tuple[type[Metric[Any]], str]] = [
    (using(lambda self, layer: layer["attn.hook_z"]),
     r"update reads 'attn.hook_z' in layer 0, where hooks\(\) asks for hook_resid_post; "
     r"add 'blocks.{layer}.attn.hook_z' to hooks\(\)"),
    (using(lambda self, layer: layer["blocks.0.hook_resid_post"]), "write 'hook_resid_post': a layer's points have"),
    (using(lambda self, layer: self.per_text.add(layer, mean=layer["hook_resid_post"].mean())),
     "per_text.add: mean has one number for a batch of 2 texts; give a torch tensor"),
    (using(lambda self, layer: self.per_text.add(layer, mean=torch.zeros(5))),
     "mean has 5 rows for a batch of 2 texts"),
    (using(lambda self, layer: self.per_text.add(layer, mean=np.zeros(2))), r"mean is a numpy ndarray of shape \[2\]"),
    (using(lambda self, layer: self.per_text.add(layer, mean=[1.0, 2.0])), r"mean is the list \[1.0, 2.0\]"),
    (using(lambda self, layer: self.per_text.add(layer, x=torch.zeros(2, *[1] * layer.index))),
     "give one shape in all"),
    (using(lambda self, layer: self.per_text.add(None, x=1)), "layer is None; give the layer that update receives"),
    (probe(compute=lambda self: self.per_text.stack("maen")), r"per_text.stack\('maen'\): it holds mean;"),
    (having(hooks=POINT), "hooks.. returned the str 'blocks.{layer}.hook_resid_post'; return a list of hook names"),
    (having(hooks=None), r"hooks\(\) returned None; return a list"),
    (having(hooks=[3]), r"hooks\(\) holds the int 3"),
    (having(compute=None), r"compute\(\) returned None; return a dict of tables by name"),
    (having(compute=[]), r"compute\(\) returned the list \[\]"),
    (having(compute={"texts": [(1,)]}), r"'texts' is the list \[\(1,\)\]; build it with self.table\('texts', rows\)"),
    (probe(compute=lambda self: {"text": self.table("text", [])}), "declares no table 'text'; did you mean texts?"),
    (with_cell(np.zeros(2)),
     r"table summary, column value: a cell is a numpy ndarray of shape \[2\]; give one float per cell"),
    (with_cell(torch.zeros(3, 1)), r"a cell is a torch Tensor of shape \[3, 1\]"),
    (with_cell("many"), "column value: 'many' is not of type float"),
    (with_row((1.0, 2.0)), r"a row has 2 cells for 1 columns \(value\)"),
    (with_row(1.0), "a row is the float 1.0; give a tuple of cells in the columns' order"),
    (with_row({"value": 1.0}), "a row is the dict"),
    (probe(compute=lambda self: {"summary": self.table("summary", None)}), "its rows are None"),
    (probe(sink_position=-1), "sink_position is the int -1; it must be a whole number of at least 0"),
    (probe(n_distances="7"), "n_distances is the str '7'"),
    (probe(state={}), "state is the dict {}; it is a method of Metric, which a run calls"),
    (probe(define=classmethod(lambda cls, params: None)), r"define\(\) returned None"),
    (probe(__init__=without_super), r"__init__ does not call super\(\).__init__"),
    (causal(conditions=lambda self: OFF), r"conditions\(\) returned one Condition, 'off'; return a list"),
    (causal(conditions=lambda self: None), r"conditions\(\) returned None; return a list of Conditions"),
    (causal(conditions=lambda self: [OFF.edits]), r"conditions\(\) holds a list; return a list of Conditions"),
    (causal(conditions=raising), "its own"),
    (causal(OFF, prompts=lambda self, tokenizer: [[0, 3]]), r"prompts\(\) holds the list \[0, 3\]"),
    (causal(conditions=lambda self: [Condition("off", [Edit(POINT, 0.0, positions=0)])]),  # type: ignore[arg-type]
     r"positions are the int 0; give a list of whole numbers from 0, such as \[0\]"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_the_error_of_a_mistake_names_the_problem_and_its_location(
    lens: Any, metric: Any, message: str
) -> None:
    run = phaselens.run(lens, metrics=[metric, "sinks"], texts=TEXTS)
    assert run.failed == [metric.name]
    (failure,) = run.metrics[metric.name].failures
    assert re.search(message, failure.message), failure.message
    assert run.metrics["sinks"].status == "ok"
    # The location is in this file, or in the base class that the test's metrics share.
    of_a_number = isinstance(vars(metric).get("sink_position", vars(metric).get("n_distances")), int | str)
    assert of_a_number or re.fullmatch(rf"({HERE}|.*/tests/runs/\w+\.py):\d+", str(failure.where))
    assert failure.where is None or str(failure).endswith(f" ({failure.where})")


def test_an_input_error_of_a_metric_has_no_location(lens: Any) -> None:
    def refuse(self: Probe) -> None:
        raise InputError("not this model")

    run = phaselens.run(lens, metrics=[probe(setup=refuse)], texts=TEXTS)
    assert str(run.metrics["probe"].failures[0]) == "InputError in construct on llama: not this model"


EDITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Edit(3, 0.0), "an edit's point is the int 3"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, "zero"), "`to` is the str 'zero'; give a number, or a function"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, None), "`to` is None"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, 0.0, positions=0), r"positions are the int 0; give a list .* such as \[0\]"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, 0.0, heads=0), "heads are the int 0; give a list"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, 0.0, positions="0"), "positions are the str '0'; give a list"),
    (lambda: Edit(POINT, 0.0, positions=(n for n in (0, 1))), "positions are a generator; give a list"),  # type: ignore[arg-type]
    (lambda: Edit(POINT, 0.0, positions=[True]), "positions contain True; give whole numbers from 0"),
    (lambda: Edit(POINT, 0.0, positions=[1.0]), "positions contain 1.0; give whole numbers from 0"),  # type: ignore[list-item]
    (lambda: Condition("off", OFF.edits[0]), "its edits are one Edit; give a list"),  # type: ignore[arg-type]
    (lambda: Condition("off", (edit for edit in OFF.edits)), "its edits are a generator"),  # type: ignore[arg-type]
    (lambda: Condition("off", ["x"]), "the str 'x' among its edits"),  # type: ignore[list-item]
    (lambda: Condition(3, OFF.edits), "a condition's name is the int 3"),  # type: ignore[arg-type]
    (lambda: Condition("off", OFF.edits, layer="1"), "its layer is the str '1'"),  # type: ignore[arg-type]
    (lambda: Condition("off", OFF.edits, seed=1.5), "its seed is the float 1.5"),  # type: ignore[arg-type]
    (lambda: Condition("off", OFF.edits, control_for=OFF), "control_for is a Condition; give the name"),  # type: ignore[arg-type]
    (lambda: Condition("off", OFF.edits, params=3), "params are the int 3"),  # type: ignore[arg-type]
    (lambda: TaskPrompt("p", "abc"), "its ids are the str 'abc'; give a list"),  # type: ignore[arg-type]
    (lambda: TaskPrompt("p", [1, 2], "1"), "scored_from is the str '1'"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), EDITS, ids=range(len(EDITS)))
def test_the_error_for_a_wrong_edit_condition_or_prompt_says_what_to_give(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_positions_may_be_any_collection_of_whole_numbers(lens: Any) -> None:
    for positions in ([0], (0,), range(1), {0}, np.array([0]), torch.tensor([0]).numpy()):
        edit = Edit("blocks.0.hook_mlp_out", np.float32(0.0), positions=positions)  # type: ignore[arg-type]
        run = phaselens.run(lens, metrics=[causal(Condition("off", [edit]))], texts=TEXTS)
        assert run.failed == []


CONTROLS: list[tuple[list[Condition], str]] = [
    ([OFF, zero("blocks.0.hook_mlp_out", 1, name="near", control_for="of")],
     "control_for is 'of', which is not a condition of this metric; did you mean off?"),
    ([zero("blocks.0.hook_mlp_out", 0, layer=0),
      zero("blocks.1.hook_mlp_out", 1, name="near", layer=1, control_for="off")],
     r"'near' \(layer 1\): control_for is 'off', which exists in layer 0 only"),
    ([OFF, zero("blocks.0.hook_mlp_out", 1, name="near", control_for="near")], "is the control of itself"),
    ([zero("blocks.0.hook_mlp_out", 1, name="near", control_for="baseline")], "leave control_for out"),
    ([OFF, *(zero("blocks.0.hook_mlp_out", 1, name="near", seed=seed, control_for=target)
             for seed, target in enumerate(("off", None)))], "give them one control_for"),
]  # fmt: skip


@pytest.mark.parametrize(("conditions", "message"), CONTROLS, ids=range(len(CONTROLS)))
def test_a_control_of_a_missing_condition_is_an_error(
    lens: Any, conditions: list[Condition], message: str
) -> None:
    run = phaselens.run(lens, metrics=[causal(*conditions)], texts=TEXTS)
    (failure,) = run.metrics["causal"].failures
    assert re.search(message, failure.message), failure.message


def test_a_control_of_a_condition_in_its_layer_is_contrasted(lens: Any) -> None:
    off = zero("blocks.0.hook_mlp_out", 0, layer=0)
    control = zero("blocks.0.hook_mlp_out", 1, name="near", layer=0, control_for="off")
    run = phaselens.run(lens, metrics=[causal(off, control)], texts=TEXTS)
    assert [record["control"] for record in run.rows("causal", "contrasts").records()] == ["near"]


class _Base(Probe):
    pass


CLASSES: list[tuple[dict[str, Any], str]] = [
    ({"name": None}, "sets no `name` .str.; write name ="),
    ({"name": 3}, "sets `name` to the int 3"),
    ({"name": ""}, "sets `name` to the str ''"),
    ({"prints": property(lambda self: True)}, "sets `prints` to .*; give a bool"),
    ({"title": 3}, "sets `title` to the int 3; give a str"),
    ({"name": "two words"}, "give a name without spaces and commas"),
    ({"version": 1}, "sets `version` to the int 1"),
    ({"tables": list(Probe.tables)}, "sets `tables` to a list .tuple."),
    ({"tables": ("texts",)}, "has the str 'texts' among its `tables`; give TableSpecs"),
    ({"display": "mean"}, "sets `display` to the str 'mean'; give a Display"),
    ({"display": Display(value="maen", title="mean", table="summary")}, "table summary has no column"),
    ({"Params": dict}, "sets `Params` to the class dict"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CLASSES, ids=range(len(CLASSES)))
def test_the_error_for_an_unusable_class_says_why(lens: Any, changes: dict[str, Any], message: str) -> None:
    metric = type("Mine", (_Base,), {"__module__": __name__, **changes})
    with pytest.raises(TypeError, match=f"here: (the display of )?Mine.* {message}"):
        require_metric(metric, "here")
    with pytest.raises(InputError, match=message):
        phaselens.run(lens, metrics=[metric], texts=TEXTS)


def test_the_error_for_a_class_without_a_name_has_its_location() -> None:
    class Nameless(_Base):
        name = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=rf"Nameless sets no `name` .*\({HERE}:\d+\)"):
        require_metric(Nameless, "here")


def test_parameters_without_a_dataclass_are_an_error() -> None:
    class Mine(Params):
        threshold: float = param(0.3, help="at or over it")

    with pytest.raises(
        TypeError, match=r"Mine.threshold is not a parameter: put @dataclass\(frozen=True\) above class Mine"
    ):
        Mine.specs()

    @dataclass(frozen=True)
    class Extended(Mine):
        second: float = param(0.3, help="at or over it")

    with pytest.raises(TypeError, match="above class Mine"):
        Extended.specs()


SPECS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Column("x", list), "column x: its type is the class list; give str, int or float"),
    (lambda: Column(3), "a column's name is the int 3"),  # type: ignore[arg-type]
    (lambda: TableSpec("t", Column("x")), "its columns are the Column .*; give a tuple"),  # type: ignore[arg-type]
    (lambda: TableSpec("t", ("x",)), "its columns are"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", also=("ppl",)), r"Display\(also=…\) holds the str 'ppl'"),  # type: ignore[arg-type]
    (lambda: Display(3, "x"), r"Display\(value=…\) is the int 3; give text"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", low=3), r"Display\(low=…\) is the int 3"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", digits="3"), "give a whole number from 0"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", percent="yes"), "give True or False"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", strong="0.3"), "give a number"),  # type: ignore[arg-type]
    (lambda: Display("x", "x", rows="head"), "give 'layer' or 'condition'"),  # type: ignore[arg-type]
    (lambda: NamedModel("mine", "folder"), "load is 'folder'; give a function"),  # type: ignore[arg-type]
    (lambda: param("a", help="h", choices="abc"), "give a tuple of strings"),  # type: ignore[arg-type]
    (lambda: param(1, help="h", minimum=2, maximum=1), "no value lies between"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), SPECS, ids=range(len(SPECS)))
def test_the_error_for_a_wrong_declaration_says_what_to_give(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_causal_metrics_without_hooks_need_no_update() -> None:
    assert CausalMetric.hooks(causal(OFF)) == ()  # type: ignore[arg-type]
