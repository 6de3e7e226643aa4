"""Adapters in peft's format: merged or kept apart, compared with peft's own model, and every reason against one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import phaselens
from phaselens.errors import InputError, ModelError
from phaselens.lens import run_checks, weight_adapters
from phaselens.testing import tiny_model
from tests.lens.conftest import text
from tests.lens.saved_adapters import peft, save_adapter
from tests.marks import mark_later_slow
from tests.toys import save_checkpoint, save_in_hub_cache

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base", "llama-gqa")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(tiny_model("llama-gqa"), tmp_path / "lora", **TARGETS)
    return tmp_path / "lora"


def close(lens, adapted, atol: float = 2e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(lens(text()), adapted(text()).logits, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    ("family", "fields"),
    mark_later_slow(
        [
            ("llama-gqa", TARGETS),
            ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
            ("llama-gqa", TARGETS | {"use_dora": True}),
            ("llama-gqa", TARGETS | {"use_rslora": True, "modules_to_save": ["input_layernorm"]}),
            ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
            ("llama-gqa", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
            ("gemma2", TARGETS | {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
            ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
            ("gpt-neox", {"target_modules": ["query_key_value", "dense"]}),
        ]
    ),
)
def test_merged_and_apart_compute_what_peft_computes(family, fields, scale, tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "base", family)
    adapted = save_adapter(tiny_model(family), tmp_path / "lora", **fields)
    lens = phaselens.load(f"{folder}+{tmp_path / 'lora'}", adapter_scale=scale)
    close(lens, adapted)
    assert all(result.ok for result in run_checks(lens))


@pytest.mark.slow
def test_a_scale_leads_from_the_base_to_the_adapted_model(base, adapter) -> None:
    name = f"{base}+{adapter}"
    ends = [phaselens.load(name, adapter_scale=scale) for scale in (0, 1)]
    assert torch.equal(ends[0](text()), phaselens.load(base)(text()))
    torch.testing.assert_close(ends[1](text()), phaselens.load(name)(text()), rtol=0, atol=2e-5)
    half = phaselens.load(name, adapter_scale=0.5)
    update = 0.5 * (ends[1].weight_of(0, "attn.W_Q") - ends[0].weight_of(0, "attn.W_Q"))
    torch.testing.assert_close(
        half.weight_of(0, "attn.W_Q"), ends[0].weight_of(0, "attn.W_Q") + update, rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_both_hashes_and_the_way_of_applying_are_recorded(base, adapter) -> None:
    lens = phaselens.load(f"{base}+{adapter}")
    digests = {
        "model.safetensors": base / "model.safetensors",
        "adapter/adapter_model.safetensors": adapter / "adapter_model.safetensors",
        "adapter/adapter_config.json": adapter / "adapter_config.json",
    }
    for name, path in digests.items():
        assert lens.info.files[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (lens.info.label, lens.info.source) == ("base+lora", f"{base}+{adapter}")
    assert lens.info.adapter == "LORA adapter lora, merged"
    description = phaselens.load(f"{base}+{adapter}", adapter_scale=0.25).info.adapter
    assert description == "LORA adapter lora, kept apart, scale 0.25"
    assert json.loads(json.dumps(lens.info.as_dict()))["adapter"] == lens.info.adapter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["absolute", "beside"])
def test_an_adapter_folder_names_its_base(base, adapter, name) -> None:
    if name == "beside":
        os.symlink(base, adapter / "weights")
    set_base(adapter, str(base) if name == "absolute" else "weights")
    by_config, by_name = phaselens.load(adapter), phaselens.load(f"{base}+{adapter}")
    assert torch.equal(by_config(text()), by_name(text()))
    assert by_config.info.files == by_name.info.files
    assert by_config.info.label == "lora"


def set_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no base model; name it yourself: BASE"),
        ("nobody/nothing", "neither a folder nor in the local cache; name it yourself: BASE"),
        ("/no/such/folder", "neither a folder nor in the local cache"),
        (".", "another adapter; merge that one first"),
    ],
)
def test_a_base_that_is_not_here_is_never_fetched(adapter, monkeypatch, name, message) -> None:
    import huggingface_hub

    monkeypatch.chdir(adapter)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    set_base(adapter, name)
    refused(str(adapter), message)


@pytest.mark.slow
def test_base_and_adapter_load_from_the_hubs_cache(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached_base = save_in_hub_cache(tmp_path, "org/base", "llama-gqa")
    cached_adapter = save_in_hub_cache(tmp_path, "org/lora")
    adapted = save_adapter(tiny_model("llama-gqa"), cached_adapter, **TARGETS)
    (cached_adapter / "config.json").unlink()
    close(phaselens.load("org/base+org/lora"), adapted)
    close(phaselens.load(f"{cached_base}+org/lora@main"), adapted)
    set_base(cached_adapter, "org/base")
    assert phaselens.load("org/base@main+org/lora").info.label == "base+lora"


def refused(name: str, message: str, **options: object) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        phaselens.load(name, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [-0.1, 1.5, "half", True, float("nan")])
def test_a_scale_is_a_number_from_0_to_1(base, adapter, scale) -> None:
    with pytest.raises(InputError, match=r"adapter_scale is .*give a number from 0"):
        phaselens.load(f"{base}+{adapter}", adapter_scale=scale)


def test_a_scale_without_an_adapter_is_refused(base) -> None:
    with pytest.raises(InputError, match="has no adapter; write BASE"):
        phaselens.load(base, adapter_scale=0.5)
    with pytest.raises(InputError, match="has no effect on a model object"):
        phaselens.load(tiny_model("llama"), adapter_scale=0.5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_an_adapter_that_replaces_weights_has_no_scale(base, tmp_path, fields, reason) -> None:
    save_adapter(tiny_model("llama-gqa"), tmp_path / "lora", **TARGETS, **fields)
    refused(f"{base}+{tmp_path / 'lora'}", f"{reason}.*leave --adapter-scale out", adapter_scale=0.5)


def test_other_adapters_of_weights_are_merged_and_have_no_scale(base, tmp_path) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = save_adapter(tiny_model("llama-gqa"), tmp_path / "ia3", config=config)
    close(phaselens.load(f"{base}+{tmp_path / 'ia3'}"), adapted)
    refused(f"{base}+{tmp_path / 'ia3'}", "is IA3, not LoRA", adapter_scale=0.5)


def test_an_adapter_that_adds_tokens_is_refused(base, tmp_path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    save_adapter(tiny_model("llama-gqa"), tmp_path / "prompt", config=config)
    refused(f"{base}+{tmp_path / 'prompt'}", "PROMPT_TUNING, which adds tokens instead of changing weights")


@pytest.mark.slow
def test_a_merge_that_changes_another_weight_is_refused(tmp_path) -> None:
    """Merged into a tied unembedding, an adapter would change the embedding as well."""
    folder = save_checkpoint(tmp_path / "tied", "llama-gqa", tie_word_embeddings=True)
    model = tiny_model("llama-gqa", tie_word_embeddings=True)
    adapted = save_adapter(model, tmp_path / "lora", target_modules=["lm_head"])
    name = f"{folder}+{tmp_path / 'lora'}"
    refused(name, "computes something else .*shares an adapted weight.*--adapter-scale 1")
    close(phaselens.load(name, adapter_scale=1), adapted)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 64}])
def test_an_adapter_of_another_model_is_refused(adapter, tmp_path, fields) -> None:
    folder = save_checkpoint(tmp_path / "other", "llama-gqa", **fields)
    refused(f"{folder}+{adapter}", "does not fit.*the adapter was made for another model")


def test_an_adapter_without_its_modules_is_refused(adapter, tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "other", "gpt2")
    refused(f"{folder}+{adapter}", "the adapter was made for another model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "safetensors file cannot be read"),
        ("half", "does not fit"),
        ("json", "adapter_config.json cannot be read"),
        ("list", "holds no JSON object"),
        ("empty", "cannot be applied"),
        ("no weights", "has no adapter_model.safetensors"),
        ("no config", "holds no adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_named(base, adapter, damage, message) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "cut":
        os.truncate(weights, 100)
    elif damage == "half":
        tensors = load_file(weights)
        save_file({name: tensor for name, tensor in tensors.items() if "lora_B" not in name}, weights)
    elif damage.startswith("no "):
        (weights if damage == "no weights" else config).unlink()
    else:
        config.write_text({"json": "{", "list": "[]", "empty": "{}"}[damage])
    refused(f"{base}+{adapter}", message)


def test_a_pickled_adapter_is_refused(base, adapter) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(f"{base}+{adapter}", "stored as pickle")


def test_nan_in_an_adapter_is_refused(base, adapter) -> None:
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor.fill_(float("nan")) for name, tensor in load_file(weights).items()}, weights)
    refused(f"{base}+{adapter}", "cannot be applied: NaNs detected")


def test_a_missing_peft_is_named(base, adapter, monkeypatch) -> None:
    monkeypatch.setattr(weight_adapters, "find_spec", lambda name: None)
    refused(f"{base}+{adapter}", r"the package peft.*is not installed; pip install 'phaselens\[peft\]'")


def test_a_folder_with_a_model_and_an_adapter_is_refused(base, adapter) -> None:
    for file in base.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    refused(str(adapter), r"holds a model and an adapter; move the adapter into a folder of its own")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "float64"])
def test_every_dtype_starts_from_the_weights_merged_in_float32(base, adapter, dtype) -> None:
    merged = phaselens.load(f"{base}+{adapter}").weight_of(1, "mlp.W_out")
    lens = phaselens.load(f"{base}+{adapter}", dtype=dtype)
    assert torch.equal(lens.weight_of(1, "mlp.W_out"), merged.to(lens.dtype))


@pytest.mark.slow
def test_two_scales_stand_side_by_side_in_a_run(base, adapter) -> None:
    name = f"{base}+{adapter}"
    run = phaselens.run(
        [f"a={name}", f"b={name}", base], metrics="sinks", texts=["a b c d"], adapter_scale={"a": 0, "b": 1}
    )
    tables = run.table("sinks", "layers").to_pylist()
    by_model = {label: [row for row in tables if row["model"] == label] for label in ("a", "b", "base")}
    sinks = {label: [row["sink_rate"] for row in rows] for label, rows in by_model.items()}
    assert sinks["a"] == sinks["base"]
    assert [model.info.adapter for model in run.models][:2] == [
        "LORA adapter lora, kept apart, scale 0",
        "LORA adapter lora, kept apart, scale 1",
    ]
    assert run.options["adapter_scale"] == {"a": 0, "b": 1}
