"""One BOS policy: runs, prompts and the methods of TransformerLens that take a text give a text the same ids."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

import phaselens
from phaselens.data import BOS_POLICIES, Encoder
from phaselens.errors import InputError
from phaselens.lens import HookedTransformer
from phaselens.patching import prompt
from phaselens.plugin import Column, Metric, TableSpec
from phaselens.testing import tiny_model, tiny_tokenizer

#: Like the tokenizers of Llama, SmolLM2, Qwen2, some OLMo models and T5.
TOKENIZERS: dict[str, dict[str, bool]] = {
    "adds BOS": {},
    "adds none": {"adds_bos": False},
    "has none": {"adds_bos": False, "has_bos": False},
    "adds BOS and EOS": {"adds_eos": True},
    "adds EOS": {"adds_bos": False, "adds_eos": True},
}
TEXTS = ["to be", "<s>to be", "<s><s>or not", "to be</s>", "a <s> b"]
SERVED = [(name, bos) for name in TOKENIZERS for bos in BOS_POLICIES if (name, bos) != ("has none", "always")]


@lru_cache
def lens_with(name: str, bos: str = "auto") -> Any:
    return phaselens.load(
        tiny_model("llama"), tokenizer=tiny_tokenizer(**TOKENIZERS[name]), bos=bos, check=False
    )


class Ids(Metric[Any]):
    """The ids that a run measures."""

    name, version = "ids", "1"
    tables = (
        TableSpec("texts", (Column("text", str, help="its id"), Column("ids", str, help="its token ids"))),
    )

    def setup(self) -> None:
        self.ids: dict[str, str] = {}

    def hooks(self) -> list[str]:
        return ["blocks.0.hook_resid_pre"]

    def update(self, layer: Any) -> None:
        batch = layer.batch
        for text, row, length in zip(batch.texts, batch.tokens.tolist(), batch.lengths, strict=True):
            self.ids[text] = " ".join(map(str, row[:length]))

    def compute(self) -> Any:
        return {"texts": self.table("texts", list(self.ids.items()))}


def measured_ids(lens: Any, texts: list[str], **options: Any) -> list[list[int]]:
    rows = phaselens.run(lens, metrics=Ids, texts=texts, **options).rows("ids", "texts").rows
    return [[int(token) for token in str(row[-1]).split()] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bos"), SERVED)
def test_every_method_gives_the_same_ids(name: str, bos: str) -> None:
    lens = lens_with(name, bos)
    for text, ids in zip(TEXTS, measured_ids(lens, TEXTS), strict=True):
        tokens = torch.tensor([ids])
        assert prompt(lens, text).ids == tuple(ids)
        assert lens.to_tokens(text).tolist() == [ids]
        assert len(lens.to_str_tokens(text)) == len(ids)
        assert torch.equal(lens(text), lens(tokens))
        _, cache = lens.run_with_cache(text, names_filter="blocks.0.hook_resid_pre")
        assert cache["blocks.0.hook_resid_pre"].shape[1] == len(ids)
        for generate in (lens.generate, lens.hf_generate):
            generated = generate(text, max_new_tokens=1, do_sample=False, return_type="tokens")
            assert generated[0, :-1].tolist() == ids
        chunks = lens.generate_stream(
            text, max_new_tokens=1, do_sample=False, return_type="tokens", verbose=False
        )
        assert torch.cat(list(chunks), 1)[0, : len(ids)].tolist() == ids
        assert lens.input_to_embed(text)[1].tolist() == [ids]


@pytest.mark.parametrize(("name", "bos"), SERVED)
def test_the_policy_decides_the_first_token(name: str, bos: str) -> None:
    lens = lens_with(name, bos)
    bos_ids = [0] * (bos == "always" or (bos == "auto" and "BOS" in name))
    assert lens.to_tokens("ab").tolist() == [[*bos_ids, 12, 13]]
    assert lens.cfg.default_prepend_bos is bool(bos_ids)
    assert (lens.info.bos, lens.bos) == (bos, bos)
    assert lens.to_single_token("a") == 12
    assert lens.get_token_position("b", "ab") == len(bos_ids) + 1


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["adds BOS", "adds none", "adds BOS and EOS"])
def test_texts_in_a_batch_give_the_logits_of_each_text_alone(name: str, side: str) -> None:
    lens = lens_with(name)
    texts = ["to be or not", "<s>to", "be</s>"]
    tokens, logits = lens.to_tokens(texts, padding_side=side), lens(texts, padding_side=side)
    pad = lens.tokenizer.pad_token_id
    for row, text in enumerate(texts):
        (ids,) = lens.to_tokens(text).tolist()
        n_pads = tokens.shape[1] - len(ids)
        pads = [pad] * n_pads
        assert tokens[row].tolist() == (ids + pads if side == "right" else pads + ids)
        row_logits = logits[row, : len(ids)] if side == "right" else logits[row, n_pads:]
        torch.testing.assert_close(row_logits, lens(text)[0], atol=2e-5, rtol=1e-4)


def test_a_bos_that_has_the_pads_id_is_not_masked() -> None:
    """GPT-2's BOS, EOS and pad are one token, so a BOS in the text has the id of a pad."""
    tokenizer = tiny_tokenizer(adds_bos=False)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "</s>"
    lens = phaselens.load(tiny_model("llama"), tokenizer=tokenizer, check=False)
    texts = ["to be or not", "</s>to"]
    assert lens.to_tokens(texts, padding_side="left")[1].tolist() == [1] * 10 + [31, 26]
    padded_logits = lens(texts, padding_side="left")[1, -3:]
    torch.testing.assert_close(padded_logits, lens("</s>to")[0], atol=2e-5, rtol=1e-4)
    padded_logits = lens(texts, prepend_bos=True, padding_side="left")[1, -3:]
    torch.testing.assert_close(padded_logits, lens("</s>to")[0], atol=2e-5, rtol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens", "stop_at_eos": False}
    for generate in (lens.generate, lens.hf_generate):
        batched = generate(texts, **options)
        for row, text in enumerate(texts):
            assert batched[row, -3:].tolist() == generate(text, **options)[0, -3:].tolist()


def test_generated_text_comes_back_as_text() -> None:
    lens = lens_with("adds BOS and EOS")
    options = {"max_new_tokens": 4, "do_sample": False}
    completion = lens.hf_generate("to be", **options)
    assert isinstance(completion, str)
    assert completion == lens.generate("to be", **options, verbose=False)
    completions = lens.hf_generate(["to be", "<s>or"], **options)
    assert completions == lens.generate(["to be", "<s>or"], **options, verbose=False)
    output = lens.hf_generate("to be", **options, return_type="tokens", output_scores=True)
    assert len(output.scores) == 4


def test_hf_generate_can_run_without_a_cache() -> None:
    """TransformerLens uses the cache by default."""
    lens = lens_with("adds BOS")
    rows: list[int] = []
    with lens.hooks([("blocks.0.hook_resid_pre", lambda residual, hook: rows.append(residual.shape[1]))]):
        lens.hf_generate("to be", 3, do_sample=False, use_past_kv_cache=False, stop_at_eos=False)
    assert rows == [6, 7, 8]


def test_prepend_bos_overrides_the_policy_for_one_call() -> None:
    lens = lens_with("adds none")
    assert lens.to_tokens("ab", prepend_bos=True).tolist() == [[0, 12, 13]]
    assert lens.to_tokens("<s>ab", prepend_bos=True).tolist() == [[0, 12, 13]]
    assert lens.to_tokens("ab").tolist() == [[12, 13]]
    lens = lens_with("adds BOS and EOS")
    assert lens.to_tokens("ab", prepend_bos=False).tolist() == [[12, 13]]
    assert lens(["ab", "b"], prepend_bos=False).shape[1] == 2
    assert lens_with("has none").to_tokens("ab", prepend_bos=True).tolist() == [
        [1, 12, 13]
    ]  # the EOS token, as in TransformerLens


def test_the_setting_of_transformer_lens_changes_the_policy_of_every_method() -> None:
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), check=False)
    lens.cfg.default_prepend_bos = False
    assert lens.bos == "never"
    assert (
        lens.to_tokens("ab").tolist()
        == [list(prompt(lens, "ab").ids)]
        == measured_ids(lens, ["ab"])
        == [[12, 13]]
    )
    lens.cfg.default_prepend_bos = True
    assert lens.bos == "auto"


def test_inputs_that_are_not_texts_or_have_no_tokens_are_refused() -> None:
    lens = lens_with("adds none")
    with pytest.raises(InputError, match="expected a text or a list of texts, received int: 5"):
        lens.to_tokens(5)
    with pytest.raises(InputError, match="expected a text or a list of texts, received list"):
        lens.to_tokens([])
    with pytest.raises(InputError, match=r"text '' has no tokens \(bos: auto\)"):
        lens.to_tokens(["a", ""])
    assert lens.to_tokens("", prepend_bos=False).shape == (1, 0)
    assert lens_with("adds BOS").to_tokens("").tolist() == [[0]]


def test_texts_are_cut_to_the_context_of_the_model() -> None:
    lens = lens_with("adds BOS")
    assert lens.to_tokens("a" * 200).tolist() == [[0, *[12] * 127]]
    assert lens.to_tokens("a" * 200, truncate=False).shape == (1, 201)


def test_loading_refuses_unknown_and_impossible_policies() -> None:
    with pytest.raises(InputError, match=r"bos is 'allways'; did you mean always\?"):
        phaselens.load(tiny_model("llama"), bos="allways")
    with pytest.raises(InputError, match="bos is `always`, but the model has no BOS token"):
        lens_with("has none", "always")
    appended = lens_with("adds BOS and EOS").info.bos_policy
    assert appended == "tokenizer adds BOS, and appends </s>, which is left out"


@pytest.mark.parametrize("method", ["forward", "generate", "generate_stream", "hf_generate"])
def test_help_still_shows_transformer_lens_parameters(method: str) -> None:
    import inspect

    from transformer_lens.model_bridge import TransformerBridge

    lens_signature, original_signature = (
        inspect.signature(getattr(cls, method)) for cls in (HookedTransformer, TransformerBridge)
    )
    assert lens_signature == original_signature


def test_caches_and_losses_of_several_texts_are_those_of_each_alone() -> None:
    """Left-padded texts are masked as TransformerLens masks them if no BOS token has the pad's id."""
    lens = lens_with("adds BOS")
    texts = ["to be or not", "so"]
    _, cache = lens.run_with_cache(texts, padding_side="left", names_filter="blocks.1.hook_resid_post")
    _, unpadded = lens.run_with_cache("so", names_filter="blocks.1.hook_resid_post")
    padded = cache["blocks.1.hook_resid_post"][1, -3:]
    torch.testing.assert_close(padded, unpadded["blocks.1.hook_resid_post"][0], atol=2e-5, rtol=1e-4)
    losses = lens(texts, return_type="loss", loss_per_token=True, padding_side="left")
    expected = lens("so", return_type="loss", loss_per_token=True)
    torch.testing.assert_close(losses[1, -2:], expected[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_texts_have_the_ids_that_transformer_lens_gives_them(side: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    lens = lens_with("adds BOS and EOS")
    for texts in ("to be", ["to be or not", "so"]):
        for prepend_bos in (None, True, False):
            expected = TransformerBridge.to_tokens(lens, texts, prepend_bos=prepend_bos, padding_side=side)
            assert torch.equal(lens.to_tokens(texts, prepend_bos=prepend_bos, padding_side=side), expected)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_positional_options_have_the_effect_of_named_ones(side: str, prepend_bos: bool | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token
    lens = phaselens.load(tiny_model("llama"), tokenizer=tokenizer, check=False)
    texts = ["to be or not", "so"]
    received: list[torch.Tensor] = []
    hooks = [("blocks.0.attn.hook_received", lambda value, hook: received.append(value))]
    with torch.no_grad(), lens.hooks(fwd_hooks=hooks):
        by_name = lens(texts, prepend_bos=prepend_bos, padding_side=side)
        by_position = lens(texts, "logits", False, prepend_bos, side)
    assert torch.equal(by_position, by_name)
    assert torch.equal(*received)
    lengths = torch.tensor([lens.to_tokens(text, prepend_bos=prepend_bos).shape[1] for text in texts])
    torch.testing.assert_close(received[0].sum(-1), lengths[:, None].expand(-1, 4).float())


def test_several_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = lens_with("adds BOS")
    encoded: list[str] = []
    call = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, text: encoded.append(text) or call(self, text))
    texts = ["to be or not", "so"]
    for side in ("right", "left"):
        lens(texts, padding_side=side)
    lens.hf_generate(texts, max_new_tokens=1)
    assert encoded == texts * 3
