"""Rotations that depend on a text's length: every text is measured as in a fresh model that runs it alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import phaselens
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import checks, frequencies
from phaselens.plugin import Condition, Edit
from phaselens.runs import applied
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.marks import mark_later_slow

N_CTX = 32
_BASE = {"rope_theta": 1e4}
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": N_CTX},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": N_CTX,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": N_CTX,
    },
}
BY_LENGTH = ("dynamic", "longrope")


#: Fields in which a family's configuration differs from Llama's.
OVERRIDES: dict[tuple[str, str], dict[str, Any]] = {
    # The trained length is a field beside the parameters of the rotation, and half of each head is rotated.
    ("phi3", "longrope"): {"original_max_position_embeddings": N_CTX},
    ("gpt-neox", "dynamic"): {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ("gpt-neox", "longrope"): {
        "rope_parameters": {
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0] * 2,
            "long_factor": [2.0, 5.0],
        }
    },
}


def fresh(rope_type: str, dtype: torch.dtype = torch.float64, family: str = "llama") -> Any:
    n_ctx = N_CTX if rope_type in ("default", "dynamic") else 4 * N_CTX
    overrides = OVERRIDES.get((family, rope_type), {})
    parameters = _BASE | ROPE_TYPES[rope_type] | overrides.get("rope_parameters", {})
    if "original_max_position_embeddings" in overrides:
        del parameters["original_max_position_embeddings"]
    options = {"max_position_embeddings": n_ctx, **overrides, "rope_parameters": parameters}
    return tiny_model(family, dtype=dtype, **options)


@functools.cache
def lens_of(rope_type: str, family: str = "llama") -> phaselens.HookedTransformer:
    """Return one lens for all tests of a rope type, so that state left by one test shows in the next."""
    return phaselens.load(fresh(rope_type, family=family), label=rope_type)


def text(length: int) -> Tensor:
    return torch.randint(2, 67, (1, length), generator=torch.Generator().manual_seed(length))


@functools.cache
def alone(rope_type: str, length: int, family: str = "llama") -> tuple[Tensor, Tensor]:
    """Return (logits, sink mass in layer 1 [head, query]) of a text in a model that has run no other."""
    model = fresh(rope_type, family=family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(text(length), output_attentions=True, use_cache=False)
    return output.logits[0], output.attentions[1][0, :, :, 0]


def require_alone(rope_type: str, length: int, logits: Tensor, sink: Tensor, family: str = "llama") -> None:
    expected_logits, expected_sink = alone(rope_type, length, family)
    torch.testing.assert_close(logits[:length], expected_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(sink[:, :length], expected_sink, atol=1e-5, rtol=0)


def stream(lens: Any, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sinks: list[Tensor] = []
    hook = ("blocks.1.attn.hook_sink", lambda sink, hook: sinks.append(sink))
    return lens.stream(tokens, [hook], unembed=True, lengths=lengths), sinks[0]


def padded(lengths: list[int]) -> Tensor:
    longest = max(lengths)
    return torch.cat([torch.nn.functional.pad(text(n), (0, longest - n)) for n in lengths])


def continued(rope_type: str, tokens: Tensor, n_new: int) -> Tensor:
    """Return a text [1, pos] and its likeliest next tokens, each from a fresh model that runs the text so far,
    uncached."""
    for _ in range(n_new):
        with torch.no_grad():
            logits = fresh(rope_type)(tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], -1)
    return tokens


LENGTHS = st.integers(2, 2 * N_CTX) | st.sampled_from([N_CTX - 1, N_CTX, N_CTX + 1])


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(batches=st.lists(st.lists(LENGTHS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_is_measured_as_alone_in_any_order_and_batch(rope_type, batches):
    lens = lens_of(rope_type)
    for lengths in batches:
        logits, sink = stream(lens, padded(lengths), torch.tensor(lengths))
        for row, length in enumerate(lengths):
            require_alone(rope_type, length, logits[row], sink[row])


@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_a_mask_gives_the_length_of_each_text(rope_type):
    """The pads may be on either side, and `lengths` is not needed."""
    lens = lens_of(rope_type)
    lengths = [20, 50]
    left_padded = torch.cat([torch.nn.functional.pad(text(n), (50 - n, 0)) for n in lengths])
    left_mask = torch.arange(50)[None] >= torch.tensor([[30], [0]])
    for tokens, mask in ((padded(lengths), left_mask.flip(-1)), (left_padded, left_mask)):
        with torch.no_grad():
            logits = lens(tokens, attention_mask=mask.long())
        for row, length in enumerate(lengths):
            text_logits = logits[row][mask[row]]
            torch.testing.assert_close(text_logits, alone(rope_type, length)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
@pytest.mark.parametrize("lengths", [(N_CTX - 4,), (2 * N_CTX - 8,), (20, N_CTX + 4)])
def test_generation_follows_a_fresh_model(rope_type, lengths):
    """Each new token is the likeliest one of a fresh model that runs the text so far without a cache."""
    lens = lens_of(rope_type)
    for length in lengths:
        generated = lens.generate(
            text(length), max_new_tokens=8, do_sample=False, verbose=False, stop_at_eos=False
        )
        assert torch.equal(generated, continued(rope_type, text(length), 8))


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_transformers_own_generation_follows_a_fresh_model(rope_type):
    lens = phaselens.load(fresh(rope_type), tokenizer=tiny_tokenizer(), check=False)
    for length in (N_CTX - 4, N_CTX + 4):
        generated = lens.hf_generate(
            text(length), 8, do_sample=False, stop_at_eos=False, return_type="tokens"
        )
        assert torch.equal(generated, continued(rope_type, text(length), 8))


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", mark_later_slow([*BY_LENGTH, "default", "linear", "yarn", "llama3"], 2))
def test_texts_generated_in_a_batch_continue_as_alone(rope_type):
    """One text outgrows the trained length during generation, the other is longer from the start."""
    lens = phaselens.load(fresh(rope_type), tokenizer=tiny_tokenizer(), check=False)
    question = "to be or not to be that is the question whether it"
    texts = {words: lens.to_tokens(words, truncate=False) for words in (question[:26], question[5:42])}
    assert [tokens.shape[1] for tokens in texts.values()] == [27, 38]
    expected = {words: continued(rope_type, tokens, 8)[0, -8:].tolist() for words, tokens in texts.items()}
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
    for batch in (list(texts), list(texts)[::-1], *([words] for words in texts)):
        streamed = lens.generate_stream(batch, max_tokens_per_yield=3, verbose=False, **options)
        for tokens in (
            lens.generate(batch, verbose=False, **options),
            lens.hf_generate(batch, **options),
            torch.cat(list(streamed), -1),
        ):
            assert [row[-8:].tolist() for row in tokens] == [expected[words] for words in batch]


@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_keys_of_another_rotation_are_refused(rope_type):
    lens = lens_of(rope_type)
    tokens = text(N_CTX + 4)
    with torch.no_grad():
        cache = lens.original_model(tokens[:, : N_CTX - 2], use_cache=True).past_key_values
        with pytest.raises(InputError, match=f"beyond {N_CTX} tokens.*without a cache"):
            lens.original_model(tokens[:, N_CTX - 2 :], past_key_values=cache)


def test_a_cache_serves_texts_of_one_rotation():
    lens = lens_of("longrope")
    tokens = text(2 * N_CTX)
    for start, end in ((5, N_CTX), (N_CTX + 3, 2 * N_CTX)):
        with torch.no_grad():
            cache = lens.original_model(tokens[:, :start], use_cache=True).past_key_values
            logits = lens.original_model(tokens[:, start:end], past_key_values=cache).logits
            model = fresh("longrope")
            expected = model(tokens[:, :end], use_cache=False).logits[:, start:]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_conditions_rotate_each_text_of_a_batch_by_its_own_length(rope_type):
    """Edits resume from a residual in the middle of the model, where the rotation needs the texts' lengths too."""
    from phaselens.plugin import Batch
    from phaselens.runs.condition_editor import ConditionEditor
    from phaselens.runs.resume import Branch, run_branches

    lens = lens_of(rope_type)
    lengths = [20, 50, N_CTX]
    batch = Batch(("a", "b", "c"), (0, 1, 2), tuple(lengths), padded(lengths))
    condition = Condition("value off", [Edit("blocks.1.attn.hook_v", 0.0, positions=[0])])
    finals: list[Tensor] = []
    branch = Branch(ConditionEditor(lens, condition.edits, batch), finals.append, lambda run: run())
    baseline = run_branches(lens, batch, [branch])
    for row, length in enumerate(lengths):
        model = phaselens.load(fresh(rope_type), check=False)
        torch.testing.assert_close(baseline[row, :length], model.stream(text(length))[0], atol=1e-5, rtol=0)
        with applied(model, condition):
            edited = model.stream(text(length))
        torch.testing.assert_close(finals[0][row, :length], edited[0], atol=1e-5, rtol=0)


def test_texts_padded_by_transformer_lens_keep_their_rotation():
    """`lens(texts)` pads a list of strings on the right and passes no mask."""
    lens = phaselens.load(fresh("dynamic"), tokenizer=tiny_tokenizer(), check=False)
    lens.tokenizer.pad_token = lens.tokenizer.eos_token
    texts = ["a short one", "and one that is a good deal longer than the trained length of this model"]
    with torch.no_grad():
        logits = lens(texts, padding_side="right")
        for row, words in enumerate(texts):
            expected = lens(words)[0]
            torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-5, rtol=0)


def test_loading_resets_a_model_that_has_run():
    model = fresh("dynamic")
    with torch.no_grad():
        model(text(2 * N_CTX), use_cache=False)
    lens = phaselens.load(model)
    logits, sink = stream(lens, text(N_CTX))
    require_alone("dynamic", N_CTX, logits[0], sink[0])


@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_a_long_text_leaves_the_model_unchanged(rope_type):
    """The text runs under inference mode, whose tensors cannot be written to outside of it."""
    lens = phaselens.load(fresh(rope_type), check=False)
    (module,) = frequencies.length_dependent(lens.original_model)
    original = module.inv_freq.clone()
    with torch.inference_mode():
        stream(lens, text(2 * N_CTX))
    assert torch.equal(module.inv_freq, original)
    for length in (2 * N_CTX, N_CTX):
        logits, sink = stream(lens, text(length))
        require_alone(rope_type, length, logits[0], sink[0])
        assert torch.equal(module.inv_freq, original)


def test_each_layer_type_keeps_its_own_rotation():
    parameters = {
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }

    def model() -> Any:
        return tiny_model(
            "gemma3", dtype=torch.float64, max_position_embeddings=N_CTX, rope_parameters=parameters
        )

    lens = phaselens.load(model())
    lengths = [50, 20, N_CTX]
    logits = lens.stream(padded(lengths), lengths=torch.tensor(lengths), unembed=True)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model()(text(length), use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, :length], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rope_type"),
    mark_later_slow(
        [
            ("phi3", "longrope"),  # transformers has no dynamic rotation for it
            *(
                (family, rope_type)
                for family in ("gpt-neox", "gpt-oss", "cohere2")
                for rope_type in BY_LENGTH
            ),
        ],
        3,
    ),
)
def test_families_that_rotate_unlike_llama_are_measured_as_alone(family, rope_type):
    """These families rotate a part of the head, or some layers only, or store the trained length elsewhere."""
    lens = lens_of(rope_type, family)
    for lengths in ([50, 20, N_CTX], [20, N_CTX + 1]):
        logits, sink = stream(lens, padded(lengths), torch.tensor(lengths))
        for row, length in enumerate(lengths):
            require_alone(rope_type, length, logits[row], sink[row], family)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_the_self_check_detects_a_rotation_that_depends_on_other_texts(rope_type, monkeypatch):
    assert all(result.ok for result in checks.run_checks(lens_of(rope_type)))
    monkeypatch.setattr("phaselens.lens.wrapping.make_independent", lambda model, rows: None)
    with pytest.raises(RefusedModel, match=r"a text beside or after a longer one.*short text beside a long"):
        phaselens.load(fresh(rope_type))


def test_only_length_dependent_rotations_are_changed():
    for rope_type in ROPE_TYPES:
        expected = 1 if rope_type in BY_LENGTH else 0
        assert len(frequencies.length_dependent(lens_of(rope_type).original_model)) == expected
