"""What heads write from position 0, in models where attention's output is not W_O times the heads' outputs."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

import phaselens
from phaselens.testing import tiny_model
from tests.lens.quantised import Curved, Normed, Packed
from tests.lens.test_weights import replaced
from tests.toys import letters, toy_tokenizer

TEXTS = [letters(9), letters(17, 3)]


class Gated(LlamaAttention):
    """Llama's attention with the heads' outputs multiplied by a gate that depends on the token."""

    def __init__(self, attention: LlamaAttention) -> None:
        super().__init__(attention.config, attention.layer_idx)
        self.to(attention.o_proj.weight.dtype)
        self.load_state_dict(attention.state_dict())
        self.gate = torch.nn.Linear(32, 32, dtype=attention.o_proj.weight.dtype)

    def forward(
        self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        gate = torch.sigmoid(self.gate(hidden_states))
        handle = self.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
        try:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        finally:
            handle.remove()


def gated() -> Any:
    model = tiny_model("llama-gqa", dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for layer in model.model.layers:
            layer.self_attn = Gated(layer.self_attn).eval()
    return model


def bitnet() -> Any:
    """transformers' module of BitNet layers; importing it loads torch's compiler, which warns of a deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("transformers.integrations.bitnet")


def bit_linear(linear: torch.nn.Linear, **options: Any) -> Any:
    """transformers' AutoBitLinear, with an output scale and norm gains that are not 1."""
    module = bitnet().AutoBitLinear(32, 32, bias=False, dtype=torch.float64, **options)
    module.weight = linear.weight
    with torch.no_grad():
        if not module.online_quant:
            module.weight_scale.fill_(0.7)
        if module.rms_norm is not None:
            module.rms_norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    return module


def bit_input(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    return bitnet().ActQuant.apply(inputs if module.rms_norm is None else module.rms_norm(inputs))


def bit_weight(module: Any) -> torch.Tensor:
    if module.online_quant:
        return bitnet().WeightQuant.apply(module.weight)
    return module.weight * module.weight_scale


def adapted() -> Any:
    """Return a Llama with a low-rank adapter at its output projections."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama-gqa", dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
    return model.to(torch.float64).eval()


MODELS = {
    "a gate before it": (gated, lambda module, x: x, lambda module: module.weight),
    "a norm before it": (
        lambda: tiny_model("bitnet", dtype=torch.float64),
        lambda module, x: x,
        lambda module: module.weight,
    ),
    "rounded inputs": (
        lambda: replaced(Packed),
        lambda module, x: module.rounded(x),
        lambda module: module.dense,
    ),
    "a norm before it, rounded inputs": (
        lambda: replaced(Rounded, family="bitnet"),
        lambda module, x: module.rounded(x),
        lambda module: module.weight,
    ),
    "a norm inside it": (
        lambda: replaced(Normed),
        lambda module, x: module.rms_norm(x),
        lambda module: module.weight,
    ),
    "AutoBitLinear": (lambda: replaced(bit_linear), bit_input, bit_weight),
    "AutoBitLinear with a norm": (
        lambda: replaced(functools.partial(bit_linear, use_rms_norm=True)),
        bit_input,
        bit_weight,
    ),
    "AutoBitLinear with a norm, its weight rounded too": (
        lambda: replaced(functools.partial(bit_linear, use_rms_norm=True, online_quant=True)),
        bit_input,
        bit_weight,
    ),
    "a low-rank adapter": (
        adapted,
        lambda module, x: x,
        lambda module: module(torch.eye(32, dtype=torch.float64)).T,
    ),
}


class Rounded(torch.nn.Linear):
    """A dense weight with inputs rounded to 8 bits, as in transformers' AutoBitLinear."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    rounded = staticmethod(lambda inputs: Packed.rounded(_RoundInputs, inputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self.rounded(inputs))


class _RoundInputs:
    """The attribute of a `Packed` that its `rounded` reads."""

    round_inputs = True


def reference(model: Any, text: str, product_input: Any, dense_weight: Any) -> list[dict[str, np.ndarray]]:
    """Return the expected norms by layer, from the model's eager attention and hooks on its modules, in float64."""
    ids = torch.tensor([toy_tokenizer()(text)["input_ids"]])
    recorded: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn

        def recorder(name: str, index: int = index) -> Any:
            def hook(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
                recorded[index, f"{name}_in"], recorded[index, name] = args[0][0], output[0]

            return hook

        handles.append(attention.v_proj.register_forward_hook(recorder("v")))
        handles.append(attention.o_proj.register_forward_hook(recorder("o")))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(ids, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    by_layer = []
    recorded = {name: value.detach() for name, value in recorded.items()}
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn.o_proj
        with torch.no_grad():
            weight = dense_weight(module).detach().T.unflatten(0, (4, 8)).double()
            inputs = product_input(module, recorded[index, "o_in"])
            norm = getattr(module, "rms_norm", None)
            normed = recorded[index, "o_in"] if norm is None else norm(recorded[index, "o_in"])
        pattern = patterns[index][0].double()
        v = recorded[index, "v"].unflatten(-1, (2, 8)).repeat_interleave(2, dim=1)
        attended = torch.einsum("hqk,khd->qhd", pattern, v)
        bos_part = pattern[:, :, 0].T[..., None] * v[0] * (normed.unflatten(-1, (4, 8)) / attended)
        head_writes = torch.einsum("qhd,hdm->qhm", inputs.unflatten(-1, (4, 8)), weight)
        bos_writes = torch.einsum("qhd,hdm->qhm", bos_part, weight)
        torch.testing.assert_close(head_writes.sum(1), recorded[index, "o"], atol=1e-9, rtol=1e-9)
        by_layer.append(
            {
                "head_output": head_writes[1:].norm(dim=-1).mean(0).numpy(),
                "true_write": bos_writes[1:].norm(dim=-1).mean(0).numpy(),
                "layer_write": bos_writes.sum(1)[1:].norm(dim=-1).mean().numpy(),
                "layer_output": recorded[index, "o"][1:].norm(dim=-1).mean().numpy(),
            }
        )
    return by_layer


def run_of(model: Any) -> phaselens.Run:
    lens = phaselens.load(model, label="tiny")
    lens.text_tokenizer = toy_tokenizer()
    return phaselens.run(lens, metrics=["bos-write"], texts=TEXTS)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Turn off the compilation of AutoBitLinear's rounding, which needs a C++ compiler and takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", MODELS)
def test_writes_equal_those_of_the_modules(name: str) -> None:
    build, product_input, dense_weight = MODELS[name]
    run = run_of(build())
    assert not run.failed
    expected = [reference(build(), text, product_input, dense_weight) for text in TEXTS]
    rows = run.rows("bos-write", "texts").records()
    assert len(rows) == len(TEXTS) * 2 * 4
    for row in rows:
        expected_layer = expected[int(row["text"])][row["layer"]]
        for column in ("head_output", "true_write"):
            assert row[column] == pytest.approx(expected_layer[column][row["head"]], rel=1e-6), column
        assert row["true_share"] == pytest.approx(row["true_write"] / row["head_output"])
        assert 0 < row["true_share_null"] < np.inf
    for row in run.rows("bos-write", "layer_texts").records():
        expected_layer = expected[int(row["text"])][row["layer"]]
        for column in ("layer_write", "layer_output"):
            assert row[column] == pytest.approx(float(expected_layer[column]), rel=1e-6), column


def test_uniform_attention_writes_its_null() -> None:
    """With equal scores, position 0 writes its null, factors of a norm included."""
    model = tiny_model("bitnet", dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    run = run_of(model)
    for row in run.rows("bos-write", "texts").records():
        assert row["true_write"] == pytest.approx(row["true_write_null"], rel=1e-6)


def test_without_a_product_all_that_needs_the_projection_is_missing() -> None:
    run = run_of(replaced(lambda linear: Curved(32, 32, bias=False, dtype=torch.float64)))
    for row in run.rows("bos-write", "texts").records():
        assert row["true_write"] is row["head_output"] is row["true_share"] is None
        assert row["write"] > 0
    for row in run.rows("bos-write", "layer_texts").records():
        assert row["layer_write"] is None
        assert row["layer_output"] > 0
    for layer in (0, 1):
        assert any(
            f"missing in layer {layer}" in warning and "does not multiply" in warning
            for warning in run.warnings
        )


def test_behind_a_norm_that_mixes_entries_only_writes_of_position_0_are_missing() -> None:
    model = tiny_model("bitnet", dtype=torch.float64)
    model.model.layers[1].self_attn.attn_sub_norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    run = run_of(model)
    for row in run.rows("bos-write", "texts").records():
        assert (row["true_write"] is None) == (row["layer"] == 1)
        assert row["head_output"] > 0
    assert any("missing in layer 1: the operation between the heads" in warning for warning in run.warnings)


def test_a_factor_of_zero_values_is_not_needed() -> None:
    """A head output of exactly zero hides its factor, but zero values at position 0 write nothing whatever it is."""
    model = tiny_model("bitnet", dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3] = 0.0
    run = run_of(model)
    assert all(row["true_write"] is not None for row in run.rows("bos-write", "texts").records())


def test_writes_with_an_unreadable_factor_are_missing_with_a_warning() -> None:
    """A head output of exactly 0, to which position 0 contributes, does not reveal its factor."""
    from phaselens_plugins.bos_write import BosWrite
    from tests.plugins.views import info, rows, view

    attended = torch.ones(1, 3, 2, 4)
    attended[0, 2, 1, 0] = 0.0
    activations = {
        "attn.hook_sink": torch.full((1, 2, 3), 0.5),
        "attn.hook_v": torch.ones(1, 3, 2, 4),
        "attn.hook_z": 2.0 * attended,
        "attn.hook_out": torch.ones(1, 3, 8),
        "attn.hook_attended": attended,
    }
    metric = BosWrite(info(head_outputs=("scaled",)), BosWrite.Params())
    assert "blocks.{layer}.attn.hook_attended" in metric.hooks()
    metric.update(view(activations, (3,), weight=torch.eye(8).view(2, 4, 8)))
    for row in rows(metric, "texts"):
        assert row["true_write"] is row["true_share"] is None
        assert row["head_output"] > 0
    assert any("is exactly 0 there" in warning.replace("\n", " ") for warning in metric.warnings)
    activations["attn.hook_v"][0, 0, 1, 0] = 0.0
    metric = BosWrite(info(head_outputs=("scaled",)), BosWrite.Params())
    metric.update(view(activations, (3,), weight=torch.eye(8).view(2, 4, 8)))
    true_writes = [row["true_write"] for row in rows(metric, "texts")]
    assert true_writes == pytest.approx([0.5 * 2.0 * 2.0, 0.5 * 2.0 * 3**0.5])


@pytest.mark.slow
def test_a_projection_is_read_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused projection too is read once, although each text is a batch."""
    from phaselens.lens import bridge

    layers_read: list[int | None] = []
    projection = bridge.projection

    def counting(lens: Any, layer: int | None, name: str) -> Any:
        layers_read.append(layer)
        return projection(lens, layer, name)

    curved_model = replaced(lambda linear: Curved(32, 32, bias=False, dtype=torch.float64))
    for model in (replaced(Packed), curved_model):
        lens = phaselens.load(model, label="tiny")
        lens.text_tokenizer = toy_tokenizer()
        batched = phaselens.run(lens, metrics=["bos-write"], texts=TEXTS)
        with monkeypatch.context() as patched:
            patched.setattr(bridge, "projection", counting)
            one_by_one = phaselens.run(lens, metrics=["bos-write"], texts=TEXTS, batch_tokens=1)
        assert layers_read == [0, 1]
        layers_read.clear()
        assert one_by_one.warnings == batched.warnings


def test_a_metric_restored_between_layers_continues() -> None:
    """Projections hold the model's own modules, here a norm that no state can hold, and are left out."""
    from dataclasses import replace

    from phaselens.plugin import LayerView, Projection
    from phaselens_plugins.bos_write import BosWrite
    from tests.plugins.views import info, view

    output = Projection(torch.eye(8).view(2, 4, 8), torch.zeros(8), norm=lambda inputs: 2 * inputs)

    def layer(index: int) -> LayerView:
        generator = torch.Generator().manual_seed(index)
        shapes = {
            "hook_sink": (2, 2, 5),
            "hook_v": (2, 5, 2, 4),
            "hook_z": (2, 5, 2, 4),
            "hook_out": (2, 5, 8),
        }
        activations = {
            f"attn.{name}": torch.rand(shape, generator=generator) for name, shape in shapes.items()
        }
        return replace(view(activations, (3, 5), index), projection=lambda name: output)

    metric = BosWrite(info(n_layers=2), BosWrite.Params())
    metric.update(layer(0))
    restored = BosWrite(info(n_layers=2), BosWrite.Params())
    restored.load_state(metric.state())
    assert metric.projections == {0: output}
    for copy in (metric, restored):
        copy.update(layer(1))
        copy.update(layer(0))
    assert not metric.warnings
    assert {name: table.rows for name, table in restored.compute().items()} == {
        name: table.rows for name, table in metric.compute().items()
    }
