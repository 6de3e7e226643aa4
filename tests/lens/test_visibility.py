"""The measured windows are those of the model's own forward, whatever its configuration says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

import phaselens
from phaselens.errors import RefusedModel
from phaselens.lens import checks, masks
from phaselens.lens.visibility import _measured_window, disagreements, measure_windows, visible
from phaselens.testing import tiny_model
from tests.marks import mark_later_slow

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "query_pre_attn_scalar": 8,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
W, ALL = 5, None
#: A configuration with a window, and the layers that use it.
WINDOWED: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "exaone4, ignored in full layers": ("Exaone4Config", {}, (W, W, W, ALL)),
    "exaone4, mixed": ("Exaone4Config", {"layer_types": MIXED}, (W, ALL, W, ALL)),
    "llama, a stray one": ("LlamaConfig", {}, (ALL,) * 4),
    "olmo2, a stray one": ("Olmo2Config", {}, (ALL,) * 4),
    "qwen2, switched off": ("Qwen2Config", {"use_sliding_window": False}, (ALL,) * 4),
    "qwen2, upper layers": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2}, (ALL, ALL, W, W)),
    "qwen3, upper layers": ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 3}, (ALL, ALL, ALL, W)),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": True, "layer_types": MIXED}, (W, ALL, W, ALL)),
    "smollm3, switched off": ("SmolLM3Config", {"use_sliding_window": False}, (ALL,) * 4),
    "mistral": ("MistralConfig", {}, (W,) * 4),
    "phi3": ("Phi3Config", {}, (W,) * 4),
    "starcoder2": ("Starcoder2Config", {}, (W,) * 4),
    "olmo3": ("Olmo3Config", {}, (W, W, W, ALL)),
    "cohere2": ("Cohere2Config", {}, (W, W, W, ALL)),
    "gemma2": ("Gemma2Config", {}, (W, ALL, W, ALL)),
    "gemma3": ("Gemma3TextConfig", {"layer_types": MIXED}, (W, ALL, W, ALL)),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, (W, ALL, W, ALL)),
}  # fmt: skip


def model_of(name: str, window: int = W) -> Any:
    config_class, fields, _ = WINDOWED[name]
    config = getattr(transformers, config_class)(**{**SHAPE, "sliding_window": window, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_later_slow(list(WINDOWED), 6))
def test_a_layer_sees_what_has_weight_in_the_models_own_eager_attention(name):
    model, tokens = model_of(name), torch.arange(3, 23)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(tokens, output_attentions=True, use_cache=False).attentions
    lens = phaselens.load(model)
    assert lens.info.windows == WINDOWED[name][2]
    position = torch.arange(20)
    for window, pattern in zip(lens.info.windows, patterns, strict=True):
        assert torch.equal(pattern[0].sum(0) > 0, visible(position[:, None], position, window))


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 64, 4096, 100_000])
def test_windows_are_measured_at_any_size_without_a_text_of_that_length(window):
    for name in ("mistral", "exaone4, ignored in full layers"):
        lens = phaselens.load(model_of(name, window))
        assert lens.info.windows == tuple(size and window for size in WINDOWED[name][2])


def test_a_window_is_found_without_evaluating_its_rule_for_a_whole_text():
    n_cells = 0

    def rule(query, key):
        nonlocal n_cells
        sees = visible(query, key, 100_000)
        n_cells += sees.numel()
        return sees

    assert _measured_window(rule, "a layer", 1) == (100_000, None)
    assert n_cells < 10_000


@pytest.mark.parametrize("family", mark_later_slow(["llama", "mistral", "gpt-oss", "gpt2"], 2))
@pytest.mark.parametrize("windows", [(7, 6), (4096, 4096), (None, 7), (1, None), (8, None)])
def test_the_self_check_sees_a_wrong_window_of_any_size(family, windows):
    lens = phaselens.load(tiny_model(family), label=family)
    assert windows != lens.info.windows
    assert set(disagreements(lens).values()) == {0.0}
    lens.info = dataclasses.replace(lens.info, windows=windows)
    results = {result.name: result for result in checks.run_checks(lens)}
    assert not results["each layer sees exactly the keys in its window"].ok
    with pytest.raises(RefusedModel, match="failed its check 'each layer sees exactly the keys"):
        checks.require(lens, checks.run_checks(lens, full=False))


@pytest.mark.slow
def test_the_self_check_sees_a_long_window_that_was_missed():
    lens = phaselens.load(model_of("mistral", 4096))
    lens.info = dataclasses.replace(lens.info, windows=(None, 4096, 4096, 4096))
    shares = disagreements(lens)
    assert shares[0] > 0
    assert shares[1] == shares[2] == shares[3] == 0


def replace_causal_mask(monkeypatch: pytest.MonkeyPatch, mask_function: Any) -> None:
    """Make transformers describe the full causal mask by `mask_function`."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "causal_mask_function", mask_function)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask_function",
    [
        lambda batch, head, query, key: (key <= query) & (query // 6 == key // 6),  # chunks, as in Llama 4
        lambda batch, head, query, key: (
            (key <= query) & ((key > query - 5) | (key == 0))
        ),  # a window and the first key
        lambda batch, head, query, key: (key <= query) & ((query - key) % 2 == 0),  # dilated
        lambda batch, head, query, key: (key <= query) | (key < 3),  # a prefix that every query sees
    ],
)
def test_a_mask_that_is_not_a_window_is_refused_by_name(monkeypatch, mask_function):
    replace_causal_mask(monkeypatch, mask_function)
    with pytest.raises(RefusedModel, match=r"llama: attention of layer 0 .* query \d+ .* key \d+"):
        phaselens.load(tiny_model("llama"), check=False)


def test_a_mask_of_unknown_origin_is_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    lens = phaselens.load(model, check=False)
    layer = model.model.layers[1].self_attn.original_component

    def remake(_module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": None if mask is None else mask.clone()}

    layer.register_forward_pre_hook(remake, with_kwargs=True)
    with pytest.raises(RefusedModel, match="llama: attention of layer 1 builds its own mask"):
        measure_windows(lens)


def test_nothing_is_recorded_outside_a_probe():
    lens = phaselens.load(tiny_model("mistral"), check=False)
    tokens = torch.arange(3, 9)[None]
    expected = lens.stream(tokens, unembed=True)
    with masks.recording() as recorder:
        recorded = lens.stream(tokens, unembed=True)
    assert recorder.rule(lens.blocks[0].attn.original_component) is not None
    assert torch.allclose(expected, recorded, atol=1e-5)
    assert torch.equal(expected, lens.stream(tokens, unembed=True))
