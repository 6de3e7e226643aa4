"""Attention that modules compute themselves (GPT-J, Bloom, Falcon, …) is measured exactly, without its matrix."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tools.families.dense import dense_attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BigBirdConfig,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXJapaneseConfig,
    MptConfig,
    OpenAIGPTConfig,
    RemBertConfig,
    XGLMConfig,
)

import phaselens
from phaselens.attention import _kernels, _key_blocks
from phaselens.lens import run_checks
from phaselens.lens.checks import capture
from phaselens.lens.points import STATISTICS
from phaselens.lens.score_attention import attending_by_lens, find_score_modules
from phaselens.testing import tiny_model
from tests.lens.conftest import by_distance, text
from tests.marks import mark_later_slow

_IDS = {"vocab_size": 67, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = {
    **_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "is_decoder": True,
}
_FALCON = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "gptj": GPTJConfig(**_GPT, rotary_dim=4),
    "bloom": BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(**_IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, expansion_ratio=2),
    "falcon, one key head": FalconConfig(**_FALCON),
    "falcon, key heads": FalconConfig(
        **_FALCON, multi_query=False, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon, alibi": FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, alibi=True),
    "gpt-neo": GPTNeoConfig(
        **_IDS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=7,
        max_position_embeddings=128,
    ),
    "codegen": CodeGenConfig(**_GPT, rotary_dim=4),
    "gpt-neox-japanese": GPTNeoXJapaneseConfig(
        **_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
    ),
    "openai-gpt": OpenAIGPTConfig(**_GPT),
    "xglm": XGLMConfig(**_IDS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "rembert": RemBertConfig(**_BERT, input_embedding_size=16, output_embedding_size=32),
    "big-bird, full attention": BigBirdConfig(**_BERT, attention_type="original_full"),
}
ALL = mark_later_slow(list(CONFIGS), 7)
ALIBI = ["bloom", "mpt", "falcon, alibi"]


def model_of(name: str) -> nn.Module:
    """A model with attention far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif "norm" not in parameter_name:
                    parameter.copy_(parameter.shape[-1] ** -0.5 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def lens_of(name: str):
    return phaselens.load(model_of(name), label=name)


def streamed(lens, tokens, **options):
    points = {
        (layer, name): f"blocks.{layer}.attn.{name}"
        for layer in range(lens.info.n_layers)
        for name in STATISTICS
    }
    return capture(lens, tokens, points, **options)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_statistics_equal_those_of_the_models_own_softmax_in_float64(name: str) -> None:
    lens = lens_of(name)
    _, attentions = dense_attention(model_of(name).double(), text())
    statistics = streamed(lens, text())
    assert len(attentions) == lens.info.n_layers
    for layer, attention in enumerate(attentions):
        pattern = attention.pattern
        expected = {
            "hook_sink": pattern[..., 0],
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
            "hook_distance": by_distance(pattern, 64),
        }
        for statistic, value in expected.items():
            torch.testing.assert_close(statistics[layer, statistic].double(), value, atol=1e-5, rtol=0)
        lse = statistics[layer, "hook_lse"].double()
        torch.testing.assert_close(lse, attention.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_logits_are_the_models_own(name: str) -> None:
    with torch.no_grad():
        expected = model_of(name)(text(), use_cache=False).logits
        torch.testing.assert_close(lens_of(name)(text()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_full_check_passes(name: str) -> None:
    assert [result for result in run_checks(lens_of(name)) if not result.ok] == []


@pytest.mark.parametrize("name", ["bloom", "gpt-neo", "falcon, one key head"])
def test_a_pattern_edit_changes_the_layers_above_and_equals_the_module_with_it(name: str) -> None:
    """Zeroed attention on key 0, by the hook and by a softmax that does the same."""
    lens, tokens = lens_of(name), text()

    def drop_first_key(pattern: Tensor, hook: object = None) -> Tensor:
        pattern = pattern.clone()
        pattern[..., 0] = 0.0
        return pattern

    edited = lens.stream(tokens, [("blocks.1.attn.hook_pattern", drop_first_key)], unembed=True)
    model = model_of(name)
    model.config._attn_implementation = "eager"
    softmax = torch.nn.functional.softmax
    n_calls = 0

    def softmax_without_first_key(scores: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        weights = softmax(scores, *args, **kwargs)
        return drop_first_key(weights) if n_calls == 2 else weights

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", softmax_without_first_key)
        expected = model(tokens, use_cache=False).logits
    assert n_calls == 2
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj"])
def test_an_edit_of_the_first_keys_scores_equals_the_same_edit_of_the_matrix(name: str) -> None:
    lens, tokens = lens_of(name), text()

    def lower(scores: Tensor, hook: object) -> Tensor:
        scores = scores.clone()
        scores[:, 2:, :, 0] -= 3.0
        return scores

    def lower_first_column(scores: Tensor, hook: object) -> Tensor:
        scores = scores.clone()
        scores[:, 2:, 1:, 0] -= 3.0
        return scores

    by_key = lens.stream(tokens, [("blocks.1.attn.hook_key_scores", lower)], unembed=True)
    by_matrix = lens.stream(tokens, [("blocks.1.attn.hook_attn_scores", lower_first_column)], unembed=True)
    assert not torch.allclose(by_key, lens.stream(tokens, unembed=True), atol=1e-3)
    torch.testing.assert_close(by_key, by_matrix, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_generation_with_a_cache_equals_the_models_own(name: str) -> None:
    if name in ("openai-gpt", "mpt"):
        pytest.skip("the model has no cache, or a fixed length")
    lens, prompt = lens_of(name), text(1, 10)
    expected = model_of(name).generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    generated = lens.generate(
        prompt, max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["gptj", "bloom", "gpt-neo"])
def test_a_mask_for_padding_on_the_left_is_kept(name: str) -> None:
    tokens = text()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model_of(name)(tokens, attention_mask=mask, use_cache=False).logits
        logits = lens_of(name).original_model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[1], expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0, 5:], expected[0, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gptj", "mpt"])
def test_a_gradient_equals_the_models_own(name: str) -> None:
    gradients = []
    for model in (model_of(name), lens_of(name).original_model):
        weight = model.get_input_embeddings().weight
        weight.grad = None
        model(text(), use_cache=False).logits[..., 3].sum().backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*reversed(gradients), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*ALIBI, "gptj", "gpt-neo"])
def test_positions_and_windows_are_measured(name: str) -> None:
    info = lens_of(name).info
    expected = "alibi" if name in ALIBI else {"gptj": "rope", "gpt-neo": "learned"}[name]
    assert info.positions == (expected,) * 2
    assert info.windows == ((None, 7) if name == "gpt-neo" else (None, None))


def test_nulling_alibi_is_refused_by_name() -> None:
    with pytest.raises(
        phaselens.RefusedModel, match="layer 0 has 'alibi' positions, which are not given as cos"
    ):
        phaselens.load(model_of("bloom"), positions="nope")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIBI)
def test_statistics_of_alibi_need_no_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 600
    monkeypatch.setattr(_kernels, "ROWS", 16)
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", 1 << 13)
    config = {"bloom": {}, "mpt": {"max_seq_len": n}, "falcon, alibi": {}}[name]
    for field, value in config.items():
        monkeypatch.setattr(CONFIGS[name], field, value)
    lens = phaselens.load(model_of(name))
    largest = _LargestTensor()
    with largest:
        lens.stream(
            torch.arange(n)[None] % 67,
            [(f"blocks.1.attn.{statistic}", lambda value, hook: None) for statistic in STATISTICS],
        )
    assert largest.n_cells < n * n / 4


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation makes."""

    n_cells = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.n_cells = max(self.n_cells, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_a_model_that_calls_the_interface_has_no_such_module_and_is_left_as_it_is() -> None:
    model = tiny_model("llama")
    assert find_score_modules(model) == []
    implementation = model.config._attn_implementation
    with attending_by_lens(model):
        assert model.config._attn_implementation == "phaselens"
    assert model.config._attn_implementation == implementation


def test_a_model_attends_by_itself_again_outside_of_the_context() -> None:
    model = model_of("bloom")
    with torch.no_grad():
        expected = model(text(), use_cache=False).logits
        with attending_by_lens(model):
            model(text(), use_cache=False)
        assert torch.equal(model(text(), use_cache=False).logits, expected)


def test_big_bird_with_blocks_of_keys_is_refused_with_what_to_do() -> None:
    config = BigBirdConfig(**_BERT)
    with pytest.raises(phaselens.RefusedModel, match='"attention_type": "original_full"'):
        phaselens.load(AutoModelForCausalLM.from_config(config))


def test_a_matrix_of_biases_for_each_query_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that adds a bias for each pair of query and key, as relative positions do."""
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    own = getattr(GPTJAttention, "_attn", None)
    if own is None:
        pytest.skip(
            "since transformers 5.24, GPT-J's attention calls the interface, which takes no such biases"
        )
    table = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(3))

    def with_matrix(self, query, key, value, attention_mask=None):
        n_queries, n_keys = query.shape[-2], key.shape[-2]
        added = table[None, :, :n_queries, :n_keys].to(query.dtype)
        return own(self, query, key, value, added if attention_mask is None else attention_mask + added)

    monkeypatch.setattr(GPTJAttention, "_attn", with_matrix)
    _, attentions = dense_attention(model_of("gptj").double(), text())
    lens = phaselens.load(model_of("gptj"), check="report")
    statistics = streamed(lens, text())
    for layer, attention in enumerate(attentions):
        entropy = torch.special.entr(attention.pattern).sum(-1)
        torch.testing.assert_close(statistics[layer, "hook_entropy"].double(), entropy, atol=1e-5, rtol=0)
