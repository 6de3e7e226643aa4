"""A metric that writes into its arguments changes neither the results of other metrics nor the model's forward."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import Batch, CausalMetric, Edit, LayerView, TaskPrompt, TextOutcome, plugins
from phaselens.plugin.views import lazy_copy
from tests.runs.conditions import causal, zero
from tests.runs.metrics import Probe, probe
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (4, 9, 2, 6)]
OFF = zero("blocks.1.hook_mlp_out", 0, layer=1)
POINTS = ("blocks.{layer}.hook_resid_pre", "blocks.{layer}.attn.hook_q", "blocks.{layer}.hook_resid_post")

WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda x: x.sub_(x.mean()),
    "everything": lambda x: x.__setitem__(slice(None), 7.0),
    "a view": lambda x: x[:, 0].zero_(),
    "detached": lambda x: x.detach().zero_(),
    "data": lambda x: x.data.zero_(),
    "numpy": lambda x: x.numpy().fill(3.0),
    "numpy of a view": lambda x: np.asarray(x[:, 0]).fill(3.0),
    "dlpack": lambda x: torch.from_dlpack(x).zero_(),
    "storage": lambda x: x.untyped_storage().fill_(1),
    "out": lambda x: torch.mul(x, 2.0, out=x),
    "resized": lambda x: x.resize_(1),
    "set": lambda x: x.set_(torch.zeros(3)),
    "new data": lambda x: setattr(x, "data", torch.zeros_like(x)),
    "foreach": lambda x: torch._foreach_zero_([x]),
}


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(num_hidden_layers=3)


def writing_metric(write: Callable[[torch.Tensor], Any], layers: tuple[int, ...] = (0, 1, 2)) -> type[Probe]:
    """A metric that writes into all its arguments in some layers, weights and tokens included."""

    def update(self: Probe, layer: LayerView) -> None:
        if layer.index in layers:
            for name in layer:
                write(layer[name])
            write(layer.weight("attn.W_O"))
            layer.batch.tokens.fill_(5)
            layer.batch.real.zero_()

    return probe(name="writer", points=POINTS, update=update, compute=lambda self: {})


def measured(lens: Any, *metrics: Any) -> dict[str, str]:
    run = phaselens.run(lens, metrics=list(metrics), texts=TEXTS, batch_tokens=14)
    return {name: json.dumps(result.as_dict()) for name, result in run.metrics.items()}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_of_one_metric_reach_neither_other_metrics_nor_the_model(lens: Any, write: Any) -> None:
    reader = probe(points=POINTS)
    tokens = torch.tensor([[0, 5, 7, 9]])
    weights = {name: tensor.clone() for name, tensor in lens.original_model.state_dict().items()}
    before = lens.stream(tokens, unembed=True)
    separate = measured(lens, reader, "bos-norm", "sinks")
    for order in (
        [writing_metric(write), reader, "bos-norm", "sinks"],
        [reader, "sinks", "bos-norm", writing_metric(write)],
    ):
        combined = measured(lens, *order)
        assert json.loads(combined.pop("writer"))["errors"] == []
        assert combined == separate
    assert torch.equal(lens.stream(tokens, unembed=True), before)
    for name, tensor in lens.original_model.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("layers", [(0,), (1,), (2,)])
def test_writes_into_any_layer_are_isolated(lens: Any, layers: tuple[int, ...]) -> None:
    reader = probe(points=POINTS)
    separate = measured(lens, reader, "bos-norm")
    combined = measured(lens, writing_metric(WRITES["data"], layers), reader, "bos-norm")
    assert {name: combined[name] for name in separate} == separate


@pytest.mark.slow
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_a_metric_that_reads_the_matrix_leaves_the_others_bit_equal(family: str, point: str) -> None:
    reader = probe(
        name="reader",
        points=(f"blocks.{{layer}}.attn.{point}",),
        update=lambda self, layer: None,
        compute=lambda self: {},
    )
    other_names = ["sinks", "bos-norm", "attention-patterns", "bos-write"]
    lens = toy_lens(family)
    assert measured(lens, reader, *other_names).items() >= measured(lens, *other_names).items()


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_a_metric_gives_the_same_bits_alone_and_with_all_others(family: str) -> None:
    names = [
        "sinks",
        "bos-norm",
        "compression",
        "massive-activations",
        "massive-values",
        "attention-patterns",
    ]
    names += ["bos-write", "layer-balance"]
    lens = toy_lens(family)
    combined = measured(lens, *names)
    for name in names:
        assert measured(lens, name)[name] == combined[name]


def test_a_metric_sees_its_own_writes(lens: Any) -> None:
    collected: list[float] = []

    def update(self: Probe, layer: LayerView) -> None:
        for name in layer:
            layer[name].fill_(2.0)
            collected.append(float(layer[name].mean()))

    measured(lens, probe(update=update, compute=lambda self: {}))
    assert set(collected) == {2.0}


def test_tensors_that_are_only_read_are_not_copied(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[bool] = []

    def update(self: Probe, layer: LayerView) -> None:
        Probe.update(self, layer)
        shared.extend(torch._C._is_cow_tensor(layer[name]) for name in layer)

    measured(lens, probe(points=POINTS, update=update))
    assert shared
    assert all(shared)


def test_memory_that_cannot_be_shared_is_copied() -> None:
    mapped = torch.from_numpy(np.arange(4.0))
    copy = lazy_copy(mapped)
    copy.zero_()
    assert mapped.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_each_metric_has_its_own_outcomes_and_batches_of_conditions(lens: Any) -> None:
    off = zero("blocks.1.hook_mlp_out", 0, layer=1)
    reader = causal(off, name="reader")

    def record(self: CausalMetric[Any], condition: Any, outcome: TextOutcome) -> None:
        for array in (outcome.loss, outcome.top, outcome.targets):
            array[:] = 0
        torch.from_numpy(outcome.loss).fill_(9.0)
        CausalMetric.record(self, condition, outcome)

    def to(tensor: torch.Tensor, site: Any) -> torch.Tensor:
        new = tensor * 0
        tensor.data.fill_(3.0)
        site.positions.fill_(1)
        site.batch.tokens.fill_(6)
        site.weight("attn.W_O").zero_()
        return new

    writer = causal(
        type(off)("written", [Edit("blocks.0.hook_mlp_out", to)], layer=0), name="writer", record=record
    )
    weight = lens.blocks[0].attn.W_O.clone()
    separate = measured(lens, reader)["reader"]
    for order in ([writer, reader], [reader, writer]):
        combined = measured(lens, *order)
        assert combined["reader"] == separate
        assert json.loads(combined["writer"])["errors"] == []
    assert torch.equal(lens.blocks[0].attn.W_O, weight)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "gradients": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(True)),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "precision": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "determinism": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "kernels": (
        torch.backends.cuda.flash_sdp_enabled,
        lambda: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.set_autocast_enabled("cpu", True),
    ),
    "oneDNN": (lambda: torch.backends.mkldnn.enabled, lambda: torch.backends.mkldnn.set_flags(False)),
    "NumPy's errors": (np.geterr, lambda: np.seterr(all="raise")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("read", "change"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_of_the_process_are_restored(
    lens: Any, read: Callable[[], Any], change: Callable[[], Any]
) -> None:
    before, collected = read(), []

    def update(self: Probe, layer: LayerView) -> None:
        change()
        assert read() != collected[0]

    def read_settings(self: Probe, layer: LayerView) -> None:
        collected.append(read())

    def compute(self: Probe) -> dict[str, Any]:
        change()
        return {}

    settings_reader = probe(update=read_settings, compute=lambda self: {})
    combined = measured(
        lens, settings_reader, probe(name="writer", update=update, compute=compute), "bos-norm"
    )
    assert json.loads(combined["writer"])["errors"] == []
    assert read() == before
    assert all(value == collected[0] for value in collected)
    assert combined["bos-norm"] == measured(lens, "bos-norm")["bos-norm"]


def test_changing_the_mapping_of_activations_affects_no_other_metric(lens: Any) -> None:
    def update(self: Probe, layer: LayerView) -> None:
        for tensor in (*layer.activations.values(), *layer.values()):
            tensor.mul_(3.0)

    reader = probe(points=POINTS)
    separate = measured(lens, reader, "bos-norm")
    combined = measured(
        lens,
        probe(name="writer", points=POINTS, update=update, compute=lambda self: {}),
        reader,
        "bos-norm",
    )
    assert {name: combined[name] for name in separate} == separate


def test_metrics_inside_another_have_their_own_views() -> None:
    tokens, states = torch.arange(6).view(2, 3), torch.ones(2, 3, 4)
    view = LayerView(0, Batch(("a", "b"), (0, 1), (3, 2), tokens), {"x": states, "y": states + 1})
    first, second = view.private_copy(["x"]), view.private_copy(["x", "y", "z"])
    assert (list(first), list(second)) == (["x"], ["x", "y"])
    first["x"].zero_()
    first.batch.tokens.zero_()
    assert (second["x"] == 1).all()
    assert (view["x"] == 1).all()
    assert second.batch.tokens.tolist() == view.batch.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_edits_of_one_condition_have_their_own_batches(lens: Any) -> None:
    collected: list[torch.Tensor] = []

    def to(tensor: torch.Tensor, site: Any) -> torch.Tensor:
        collected.append(site.batch.tokens.clone())
        site.batch.tokens.fill_(6)
        return tensor * 0

    points = ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    measured(lens, causal(type(OFF)("both", [Edit(point, to) for point in points])))
    assert len(collected) > 1
    assert all((tokens != 6).any() for tokens in collected)


def test_tokenizer_settings_changed_by_prompts_stay_with_that_metric(lens: Any) -> None:
    def change_tokenizer(self: CausalMetric[Any], tokenizer: Any) -> list[TaskPrompt]:
        tokenizer.add_tokens(["a b c"])
        tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
        return [TaskPrompt("mine", [0, 5, 7])]

    def read_with_tokenizer(self: CausalMetric[Any], tokenizer: Any) -> list[TaskPrompt]:
        return [TaskPrompt("mine", tokenizer("a b c d")["input_ids"])]

    reader = causal(OFF, name="reader", prompts=read_with_tokenizer)
    separate = measured(lens, reader, "bos-norm")
    combined = measured(lens, causal(OFF, name="writer", prompts=change_tokenizer), reader)
    assert combined["reader"] == separate["reader"]
    assert len(lens.text_tokenizer) == len(toy_lens().text_tokenizer)
    assert measured(lens, "bos-norm")["bos-norm"] == separate["bos-norm"]


def test_a_hook_on_finished_runs_changes_no_result(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def clear_results(run: Any, names: Any) -> list[str]:
        for result in run.metrics.values():
            for table in result.tables.values():
                table.rows[:] = []
            result.tables.clear()
            result.failures.append("none")
        for text in run.texts:
            text.n_tokens.clear()
        run.options["positions"]["llama"] = "nope"
        for changed in (run.texts, run.models, run.warnings, run.errors):
            changed.append(changed)
        return []

    separate = phaselens.run(lens, metrics=["bos-norm", "sinks"], texts=TEXTS)
    monkeypatch.setattr(
        type(plugins()), "notify_run_finished", lambda self, run, names: clear_results(run, names)
    )
    assert phaselens.run(lens, metrics=["bos-norm", "sinks"], texts=TEXTS) == separate
