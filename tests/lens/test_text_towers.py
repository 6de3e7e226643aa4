"""The text model inside a model of several modalities: its own logits, its measures, and none of the other weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import phaselens
from phaselens.errors import ModelError
from phaselens.lens import checkpoints, run_checks, text_towers
from phaselens.lens.model_source import ModelSource
from phaselens.testing import tiny_tokenizer
from tests.lens.towers import TOWERS, tiny_tower
from tests.marks import mark_later_slow

# Types whose text model the lens measures, with an adapter of TransformerLens and without.
_MEASURED = ("llava", "qwen2_5_vl", "gemma3", "mistral3", "qwen3_vl", "internvl", "idefics3", "aya_vision")


def text() -> torch.Tensor:
    """Tokens [2, 24], none of which stands for an image."""
    return torch.randint(2, 60, (2, 24), generator=torch.Generator().manual_seed(7))


def saved(folder: Path, model_type: str, **overrides: Any) -> tuple[Path, Any]:
    model = tiny_tower(model_type, **overrides)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("model_type", mark_later_slow(list(TOWERS), 3))
def test_the_text_model_computes_what_the_whole_computes_on_text(model_type, tmp_path) -> None:
    folder, full_model = saved(tmp_path / model_type, model_type)
    model = checkpoints.load_pretrained(ModelSource.identify(str(folder)), torch.float32, torch.device("cpu"))
    assert type(model).__name__ == TOWERS[model_type][3]
    with torch.no_grad():
        logits = model(text(), use_cache=False).logits
        if model_type == "gemma3n":
            # Without its tower, the whole model cannot run; the text class is made of the same weights.
            full_model = text_towers._causal_model(full_model)
        torch.testing.assert_close(logits, full_model(text(), use_cache=False).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", mark_later_slow(list(TOWERS), 3))
def test_no_other_weights_are_in_memory(model_type, tmp_path) -> None:
    folder, full_model = saved(tmp_path / model_type, model_type)
    model = checkpoints.load_pretrained(ModelSource.identify(str(folder)), torch.float32, torch.device("cpu"))
    text_model = full_model.get_submodule(text_towers.text_path(full_model))
    expected = {id(tensor): tensor.numel() for tensor in text_model.parameters()}
    unembedding = full_model.get_output_embeddings()
    expected |= {id(tensor): tensor.numel() for tensor in unembedding.parameters()}
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(expected.values())
    assert not any("vision" in name or "visual" in name for name, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", mark_later_slow(_MEASURED))
def test_the_text_model_is_measured_exactly(model_type, tmp_path) -> None:
    folder, full_model = saved(tmp_path / model_type, model_type)
    lens = phaselens.load(folder)
    assert all(result.ok for result in run_checks(lens))
    assert (lens.info.architecture, lens.info.part_of) == (TOWERS[model_type][3], type(full_model).__name__)
    assert (lens.info.d_model, lens.info.n_layers, lens.info.d_vocab) == (32, 2, 67)
    assert lens.info.positions == ("rope", "nope" if model_type == "aya_vision" else "rope")
    full_model.double()
    full_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = full_model(text(), output_attentions=True, use_cache=False)
    sinks: list[torch.Tensor] = []
    lens.stream(text(), [("blocks.1.attn.hook_sink", lambda sink, hook: sinks.append(sink))])
    torch.testing.assert_close(sinks[0].double(), output.attentions[1][..., 0].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(lens(text()).double(), output.logits.double(), rtol=0, atol=1e-4)


def test_a_run_measures_a_tower_by_its_folder(tmp_path) -> None:
    folder, _ = saved(tmp_path / "llava", "llava")
    tiny_tokenizer().save_pretrained(folder)
    run = phaselens.run([folder], metrics="sinks", texts=["to be or not to be"], n_texts=1)
    assert run.models[0].info.part_of == "LlavaForConditionalGeneration"


def test_both_layouts_of_the_weights_load(tmp_path) -> None:
    """Llava checkpoints call the text model language_model.model, or model.language_model."""
    folder, full_model = saved(tmp_path / "llava", "llava")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in tensors
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        tensors = {re.sub(f"^{re.escape(old)}", new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    lens = phaselens.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(lens(text()), full_model(text()).logits, rtol=0, atol=1e-5)


def test_a_missing_text_weight_is_refused_and_a_missing_vision_weight_is_not(tmp_path) -> None:
    folder, _ = saved(tmp_path / "llava", "llava")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    text_only = {
        name: tensor for name, tensor in tensors.items() if "vision" not in name and "projector" not in name
    }
    assert len(text_only) < len(tensors)
    save_file(text_only, path, metadata={"format": "pt"})
    phaselens.load(folder, check=False)
    del text_only["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(text_only, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors .*layers.1.mlp.up_proj.weight"):
        phaselens.load(folder)


def test_a_text_checkpoint_with_the_whole_configuration_loads_by_its_text_class(tmp_path) -> None:
    folder, full_model = saved(tmp_path / "whole", "llama4")
    text_model = text_towers._causal_model(full_model)
    text_model.save_pretrained(tmp_path / "text")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Llama4ForCausalLM"]}
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    model = checkpoints.load_pretrained(
        ModelSource.identify(str(tmp_path / "text")), torch.float32, torch.device("cpu")
    )
    with torch.no_grad():
        torch.testing.assert_close(model(text()).logits, text_model(text()).logits, rtol=0, atol=1e-6)


def test_an_adapter_trained_on_the_whole_fits_its_text_model(tmp_path) -> None:
    from tests.lens.saved_adapters import save_adapter

    folder, full_model = saved(tmp_path / "llava", "llava")
    targets = r".*language_model.*\.q_proj"
    adapted = save_adapter(full_model, tmp_path / "lora", target_modules=targets)
    lens = phaselens.load(f"{folder}+{tmp_path / 'lora'}")
    with torch.no_grad():
        torch.testing.assert_close(lens(text()), adapted(text()).logits, rtol=0, atol=2e-5)


def test_shards_of_a_tower_load_as_one_file_does(tmp_path) -> None:
    folder, full_model = saved(tmp_path / "llava", "llava")
    shutil.rmtree(folder)
    full_model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(
            phaselens.load(folder)(text()), full_model(text()).logits, rtol=0, atol=1e-5
        )


def test_a_class_that_reads_more_files_on_loading_does_not(tmp_path, monkeypatch) -> None:
    """Qwen2.5-Omni's own `from_pretrained` reads a pickle with voices."""
    import transformers

    folder, _ = saved(tmp_path / "llava", "llava")
    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "from_pretrained", None)
    assert phaselens.load(folder, check=False).info.architecture == "LlamaForCausalLM"
