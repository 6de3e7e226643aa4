"""A hand-built network that repeats tokens of its text, its tokenizer, and a third party's causal metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from phaselens.plugin import plugins

DIGITS = "0123456789"
COLOURS = ("green", "red", "white", "blue", "black")
#: Tokens that the network can predict, from id 3 on; any other word is unknown, and adds nothing to the stream.
CONTENT = (*DIGITS, *COLOURS)
#: As the last word, it makes the network predict `blue`, whatever else is in the text.
CUE = "sky"
FIRST = 3
_READ, _WRITTEN, _CUE, _OTHER = 0, len(CONTENT), 30, 31

THIRD_PARTY = '''
from dataclasses import dataclass

from phaselens.plugin import CausalMetric, Condition, Edit, Params, param


@dataclass(frozen=True)
class Layers(Params):
    layer: int = param(0, help="the layer whose heads are off", minimum=0)
    seeds: int = param(0, help="repeats of the control", minimum=0)


class Silence(CausalMetric):
    """Heads of one layer off; the control leaves texts alone that their content selects."""

    name, version, Params = "silence", "1", Layers

    def setup(self):
        self.layers_by_text = {}

    def hooks(self):
        return ["blocks.{layer}.attn.hook_z", "hook_embed"]

    def update(self, layer):
        expected = {"hook_embed"} if layer.index is None else {"attn.hook_z"}
        assert set(layer) == expected, set(layer)
        for text in layer.batch.texts:
            self.layers_by_text.setdefault(text, []).append(layer.index)

    def merge(self, other):
        super().merge(other)
        self.layers_by_text.update(other.layers_by_text)

    def conditions(self):
        self.warn(f"saw {len(self.layers_by_text)} texts")
        layer = self.params.layer
        point = f"blocks.{layer}.attn.hook_z"
        conditions = [Condition("silence", [Edit(point, 0.0)], layer=layer)]
        for seed in range(self.params.seeds):
            edits = [Edit(point, ZeroByContent(seed))]
            conditions.append(Condition("at random", edits, layer=layer, seed=seed, control_for="silence"))
        return conditions


@dataclass(frozen=True)
class ZeroByContent:
    """Zero in texts whose hash is even (or odd), so that the edit of a prompt does not depend on its batch."""

    seed: int

    def __call__(self, tensor, site):
        assert len(site.batch.hashes) == tensor.shape[0]
        is_zeroed = [int(text_hash[:8], 16) % 2 == self.seed % 2 for text_hash in site.batch.hashes]
        edited = tensor.clone()
        edited[is_zeroed] = 0.0
        return edited
'''


def word_tokenizer() -> Any:
    """Return a tokenizer of words and single digits, in the 67 ids of the tiny models: `<s>` 0, `</s>` 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *CONTENT, CUE]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def repeater(*, n_ctx: int = 128, label: str = "repeater") -> Any:
    """Return a lens on one layer of uniform attention without positions, in float64.

    It predicts the token of CONTENT that is most frequent in the text so far; without one, all logits are equal. After
    CUE it predicts `blue`.
    """
    import phaselens
    from phaselens.testing import tiny_model

    model = tiny_model(
        "llama-drope-nope",
        num_hidden_layers=1,
        num_key_value_heads=4,
        max_position_embeddings=n_ctx,
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
            weight.zero_()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        embedding = model.get_input_embeddings().weight.zero_()
        logits = model.lm_head.weight.zero_()
        embedding[:, _OTHER] = 1.0
        for index in range(len(CONTENT)):
            embedding[FIRST + index] = 0.0
            embedding[FIRST + index, _READ + index] = 1.0
            layer.self_attn.v_proj.weight[index, _READ + index] = 1.0
            layer.self_attn.o_proj.weight[_WRITTEN + index, index] = 1.0
            logits[FIRST + index, _WRITTEN + index] = 10.0
        cue = FIRST + len(CONTENT)
        embedding[cue] = 0.0
        embedding[cue, _CUE] = 1.0
        logits[FIRST + CONTENT.index("blue"), _CUE] = 100.0
    return phaselens.load(model, label=label, tokenizer=word_tokenizer(), check=False)


def third_party(folder: Path) -> Path:
    """Return a file with the causal metric `silence`."""
    path = folder / "silence.py"
    path.write_text(THIRD_PARTY)
    return path


def installed_silence(folder: Path) -> Iterator[None]:
    """Install the metric `silence` until the generator is resumed, for a fixture."""
    plugins.cache_clear()
    plugins().add_file(str(third_party(folder)))
    yield
    plugins.cache_clear()
