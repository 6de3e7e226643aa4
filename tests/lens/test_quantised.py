"""Quantised checkpoints: what computes is measured, weights are the dequantised ones, a missing package is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import phaselens
from phaselens.errors import InputError, ModelError
from phaselens.lens import quantised, run_checks
from phaselens.lens.token_losses import token_losses
from phaselens.testing import tiny_model
from tests.lens.conftest import text
from tests.marks import mark_later_slow
from tests.toys import save_checkpoint

WEIGHTS = ("attn.W_O", "mlp.W_out")


def save_quantised(folder: Path, family: str, quantisation: Any, **fields: Any) -> Any:
    """Quantise a tiny model, save it into `folder`, and return transformers' own model of that folder."""
    from transformers import AutoModelForCausalLM

    save_checkpoint(folder / "plain", family, **fields)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=quantisation, dtype=torch.float32
    )
    model.save_pretrained(folder / "quantised")
    return AutoModelForCausalLM.from_pretrained(folder / "quantised", dtype=torch.float32)


def torchao_config(kind: str, **fields: Any) -> Any:
    pytest.importorskip("torchao")
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, kind)(), **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", mark_later_slow(["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
)
@pytest.mark.parametrize(
    "family", mark_later_slow(["llama-gqa", "gemma2", "phi3", "gpt-neox", "qwen3", "gpt-oss"])
)
def test_torchao_checkpoints_load_and_measure_their_dequantised_weights(
    family, kind, tmp_path, monkeypatch
) -> None:
    from transformers import PreTrainedModel

    model = save_quantised(tmp_path, family, torchao_config(kind))
    with torch.no_grad():
        expected = model(text()).logits
    dense = {
        name: module.weight.dequantize()
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj", "dense", "dense_4h_to_h"))
    }
    monkeypatch.setattr(PreTrainedModel, "to", None)
    lens = phaselens.load(tmp_path / "quantised")
    monkeypatch.undo()
    rounds = kind == "Int8DynamicActivationInt8WeightConfig"
    assert (lens.arithmetic.dtype, lens.arithmetic.rounds_inputs) == (torch.float32, rounds)
    assert lens.arithmetic.limit <= (0.2 if rounds else 2e-5)
    assert lens.info.quantisation == "torchao"
    assert all(result.ok for result in run_checks(lens))
    torch.testing.assert_close(lens(text()), expected, rtol=0, atol=0.1 if rounds else 1e-5)
    for layer in range(lens.info.n_layers):
        weight = lens.projection_of(layer, "attn.W_O").weight.flatten(0, 1)
        name = next(
            name
            for name in dense
            if f".{layer}." in name and "attention" in name.replace("attn", "attention")
        )
        torch.testing.assert_close(weight, dense[name].T, rtol=1e-5, atol=1e-6)
    assert lens.projection_of(0, "attn.W_O").is_linear != rounds


@pytest.mark.slow
def test_a_quantised_unembedding_gives_the_models_own_losses(tmp_path) -> None:
    config = torchao_config("Int8WeightOnlyConfig", include_input_output_embeddings=True)
    model = save_quantised(tmp_path, "llama-gqa", config)
    lens = phaselens.load(tmp_path / "quantised")
    tokens = text(1)
    losses = token_losses(lens, lens.stream(tokens)[0, :-1], tokens[0, 1:])
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    torch.testing.assert_close(losses.loss, expected, rtol=0, atol=1e-5)


def save_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Save a tiny Llama with projections in 8-bit floats, as DeepSeek's checkpoints; return its dequantised weights."""
    save_checkpoint(folder, "llama-gqa")
    stored, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = dense[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            dense[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantisation(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    return dense


def set_quantisation(folder: Path, fields: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in 8-bit floats")
def test_8_bit_floats_are_dequantised_on_a_cpu(tmp_path) -> None:
    dense = save_fp8(tmp_path / "fp8")
    lens = phaselens.load(tmp_path / "fp8")
    model = tiny_model("llama-gqa")
    model.load_state_dict(dense)
    with torch.no_grad():
        torch.testing.assert_close(lens(text()), model(text()).logits, rtol=0, atol=1e-5)
    assert lens.info.quantisation == "fp8, dequantised"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel and optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(fields, packages, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    set_quantisation(save_checkpoint(tmp_path, "llama"), fields)
    method = fields.get("quant_method", "bitsandbytes")
    refused(tmp_path, rf"quantised by {method}, and {packages}, .*pip install 'phaselens\[{method}\]'")


def refused(source: Any, message: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        phaselens.load(source, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused(tmp_path) -> None:
    """transformers would load such weights as if they were not quantised."""
    set_quantisation(save_checkpoint(tmp_path, "llama"), {"quant_method": "magic"})
    refused(tmp_path, "quantised by 'magic', which transformers does not know")


def test_what_transformers_cannot_load_yet_is_refused_with_its_reason(tmp_path) -> None:
    pytest.importorskip("hqq")
    set_quantisation(save_checkpoint(tmp_path, "llama"), {"quant_method": "hqq", "quant_config": {}})
    refused(tmp_path, "could not be loaded")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors_round_their_inputs_in_a_known_way(kind, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = save_checkpoint(tmp_path, "llama-gqa")
    largest, dtype = (127, torch.int8) if kind == "int" else (448, torch.float8_e4m3fn)
    stored, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / largest
            stored[name] = (tensor / scale).round().to(dtype) if kind == "int" else (tensor / scale).to(dtype)
            stored[name.replace("weight", "weight_scale")] = scale
            dense[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel"},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    fields = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"all": scheme},
    }
    set_quantisation(folder, fields)
    lens = phaselens.load(folder)
    assert all(result.ok for result in run_checks(lens))
    output = lens.projection_of(0, "attn.W_O")
    expected = dense["model.layers.0.self_attn.o_proj.weight"].T
    torch.testing.assert_close(output.weight.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
    assert output.rounding.startswith("8-bit integers" if kind == "int" else "8-bit floats")


def with_hqq(compute_dtype: torch.dtype) -> Any:
    """A tiny Llama whose projections hqq has quantised in memory."""
    hqq = pytest.importorskip("hqq.core.quantize")
    model = tiny_model("llama-gqa", hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
                    linear = hqq.HQQLinear(child, settings, compute_dtype=compute_dtype, device="cpu")
                    setattr(parent, name, linear)
    return model


@pytest.mark.slow
def test_a_model_that_hqq_has_quantised_is_measured() -> None:
    model = with_hqq(torch.float32)
    dense = model.model.layers[1].self_attn.o_proj.dequantize()
    lens = phaselens.load(model)
    assert all(result.ok for result in run_checks(lens))
    torch.testing.assert_close(lens.weight_of(1, "attn.W_O").flatten(0, 1), dense.T, rtol=0, atol=1e-6)


def test_a_module_that_cannot_compute_in_the_models_dtype_is_named() -> None:
    refused(with_hqq(torch.bfloat16), "own forward on text fails in float32.*same dtype")


class Casting(nn.Linear):
    """A linear module that computes in another dtype, as bitsandbytes' 4-bit modules do."""

    compute_in = torch.bfloat16

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(self.compute_in)
        return nn.functional.linear(inputs.to(self.compute_in), weight).to(inputs.dtype)


class CastingToHalf(Casting):
    compute_in = torch.float16


@pytest.mark.slow
@pytest.mark.parametrize("module_class", [Casting, CastingToHalf])
def test_the_tolerance_is_that_of_the_coarsest_module(module_class) -> None:
    model = tiny_model("llama-gqa")
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = module_class
    lens = phaselens.load(model)
    assert lens.dtype == torch.float32
    assert lens.arithmetic == quantised.Arithmetic(module_class.compute_in)
    assert all(result.ok for result in run_checks(lens))
    # Read through the module: the weight that it multiplies by.
    weight = lens.weight_of(0, "attn.W_O").flatten(0, 1)
    stored = lens.original_model.model.layers[0].self_attn.o_proj._original_component.weight
    assert torch.equal(weight, stored.T.to(module_class.compute_in).float())


def test_a_quantised_object_stays_where_it_is() -> None:
    model = tiny_model("llama-gqa")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(InputError, match="is quantised, so that it stays on its device and in its dtype"):
        phaselens.load(model, dtype="bf16")
