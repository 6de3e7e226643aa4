"""Causal metrics give the losses of the unwrapped model under plain hooks on its modules, in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tools.families.models import tiny_model as survey_model
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gpt_oss import modeling_gpt_oss

import phaselens
from phaselens.testing import tiny_model
from tests.lens.mixtures import DTYPES, MIXTURES, tiny_mixture
from tests.plugins.ablations import content, run
from tests.plugins.overwritten_cells import record_cells
from tests.toys import letters, toy_tokenizer

#: Texts of one length: the run's batch then has no pads, and the same shape as the plain forward's.
TEXTS = [letters(20), letters(20, 3), letters(20, 5)]
QUICK = {("qwen2_moe", torch.bfloat16), ("gpt_oss", torch.float16)}
CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in ("llama-gqa", "qwen3", "cohere2", *MIXTURES)
    for dtype in DTYPES
]
#: The largest difference in nats where logits are bit-equal: losses are computed in float32, or in float64.
NATS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
#: GPT-OSS' own attention rounds its scores to the model's dtype.
GPT_OSS_NATS = {**NATS, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def model_of(name: str, dtype: torch.dtype) -> Any:
    if name == "gpt_oss":  # with all experts at work, rounding cannot tip a choice
        return tiny_mixture(name, dtype, num_local_experts=4)
    return (tiny_mixture if name in MIXTURES else tiny_model)(name, dtype=dtype)


def limit_of(name: str, dtype: torch.dtype) -> float:
    return (GPT_OSS_NATS if name == "gpt_oss" else NATS)[dtype]


def lens_of(name: str, dtype: torch.dtype) -> Any:
    lens = phaselens.load(model_of(name, dtype), label=name)
    lens.text_tokenizer = toy_tokenizer()
    return lens


@contextmanager
def hooked(modules: list[torch.nn.Module], edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `edit` to the output of each module."""

    def on_output(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([edit(output[0]), *output[1:]])
        return edit(output)

    handles = [module.register_forward_hook(on_output) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_losses(model: Any) -> np.ndarray:
    """Return the mean loss [text] of one batch of all texts."""
    ids = torch.tensor([toy_tokenizer()(text)["input_ids"] for text in TEXTS])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2).to(dtype), ids[:, 1:], reduction="none")
    return losses.mean(-1).numpy()


def plain_model(name: str, dtype: torch.dtype) -> Any:
    """Return the model with its own attention: eager where it has sink logits, SDPA elsewhere."""
    model = model_of(name, dtype)
    model.set_attn_implementation(_implementation(name))
    if dtype == torch.float64 and name in MIXTURES:
        model.set_experts_implementation("eager")  # the only one that runs
    return model


def _implementation(name: str) -> str:
    return "eager" if name == "gpt_oss" else "sdpa"


def mlp_of(layer: torch.nn.Module) -> torch.nn.Module:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp  # type: ignore[return-value]


def losses_of(result: Any, metric: str, condition: str, layer: int | None) -> np.ndarray:
    records = result.rows(metric, "texts").records()
    return np.array(
        [
            record["loss"]
            for record in records
            if record["condition"] == condition and record["layer"] == layer
        ]
    )


def zero_everywhere(output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def zero_at_bos(output: Tensor) -> Tensor:
    output = output.clone()
    output.view(len(TEXTS), -1, output.shape[-1])[:, 0] = 0.0
    return output


def require_equal(
    measured: np.ndarray, expected: np.ndarray, name: str, dtype: torch.dtype, condition: str = "baseline"
) -> None:
    assert measured.shape == expected.shape == (len(TEXTS),)
    assert np.abs(measured - expected).max() <= limit_of(name, dtype), (condition, measured, expected)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_ablations_equal_hooks_on_modules(name: str, dtype: torch.dtype) -> None:
    lens, model = lens_of(name, dtype), plain_model(name, dtype)
    bos = run("bos-mlp", lens, texts=TEXTS, params={"at": "sweep", "seeds": 0})
    parts = run("layer-ablation", lens, texts=TEXTS, params={"part": "each", "seeds": 0})
    require_equal(losses_of(bos, "bos-mlp", "baseline", None), plain_losses(model), name, dtype)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, mlp_of(layer)
        for metric, condition, modules, edit in (
            ("bos-mlp", "each layer", [mlp], zero_at_bos),
            ("layer-ablation", "MLP off", [mlp], zero_everywhere),
            ("layer-ablation", "attention off", [attention], zero_everywhere),
            ("layer-ablation", "attention and MLP off", [attention, mlp], zero_everywhere),
            ("layer-ablation", "attention and MLP off at BOS", [attention, mlp], zero_at_bos),
        ):
            with hooked(modules, edit):
                expected = plain_losses(model)
            measured = losses_of(bos if metric == "bos-mlp" else parts, metric, condition, index)
            require_equal(measured, expected, name, dtype, f"{condition} in layer {index}")


def edited_attention(name: str, cells: dict[tuple[int, str], np.ndarray]) -> str:
    """Register the model's own attention with cells [text, head, d_head] of its queries and keys set to 0."""
    own, own_mask = sdpa_attention_forward, sdpa_mask
    if name == "gpt_oss":
        own, own_mask = modeling_gpt_oss.eager_attention_forward, eager_mask

    def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        states = {"q": query, "k": key}
        for tensor in states:
            if (module.layer_idx, tensor) in cells:
                mask = torch.from_numpy(cells[module.layer_idx, tensor])[:, :, None]
                states[tensor] = states[tensor].masked_fill(mask, 0.0)
        return own(module, *states.values(), *args, **options)

    AttentionInterface.register("edited", attend)
    AttentionMaskInterface.register("edited", own_mask)
    return "edited"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_disrupted_queries_and_keys_equal_an_edit_in_the_models_attention_function(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells_by_text = record_cells(monkeypatch)
    params = {"conditions": "top-1", "seeds": 1}
    result = run("qk-disruption", lens_of(name, dtype), texts=TEXTS, params=params)
    measured = losses_of(result, "qk-disruption", "top-1", None)
    cells = {
        point: np.stack([by_text[content(text)] for text in TEXTS])
        for point, by_text in cells_by_text.items()
    }
    assert cells
    assert all(selected.any() for selected in cells.values())
    model = plain_model(name, dtype)
    unedited = plain_losses(model)
    model.set_attn_implementation(edited_attention(name, cells))
    expected = plain_losses(model)
    assert np.abs(expected - unedited).max() > 2 * limit_of(name, dtype)
    require_equal(measured, expected, name, dtype, "top-1")


@pytest.mark.slow
def test_attention_that_adds_the_residual_itself_is_ablated_inside() -> None:
    lens, model = phaselens.load(survey_model("bloom")), survey_model("bloom")
    lens.text_tokenizer = toy_tokenizer()
    result = run("layer-ablation", lens, texts=TEXTS, params={"part": "attn", "seeds": 0})
    for index, layer in enumerate(model.transformer.h):
        with hooked([layer.self_attention.dense], zero_everywhere):
            expected = plain_losses(model)
        measured = losses_of(result, "layer-ablation", "attention off", index)
        require_equal(measured, expected, "bloom", torch.float32, f"attention off in layer {index}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_float32_before_an_unembedding_in_half_precision_gives_the_models_losses(
    dtype: torch.dtype,
) -> None:
    lens = phaselens.load(survey_model("mamba2").to(dtype))
    lens.text_tokenizer = toy_tokenizer()
    result = run("bos-mlp", lens, texts=TEXTS, params={"seeds": 0})
    expected = plain_losses(survey_model("mamba2").to(dtype))
    require_equal(losses_of(result, "bos-mlp", "baseline", None), expected, "mamba2", dtype)
