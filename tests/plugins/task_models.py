"""A network built by hand that repeats what its text holds, its tokenizer, and a third party's causal metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DIGITS = "0123456789"
COLOURS = ("green", "red", "white", "blue", "black")
#: Tokens that the network can say, from id 3 on; any other word is unknown, and says nothing.
CONTENT = (*DIGITS, *COLOURS)
#: A word that, where it stands last, makes the network say `blue`, whatever else is in the text.
CUE = "sky"
FIRST = 3
_READ, _WRITTEN, _CUE, _OTHER = 0, len(CONTENT), 30, 31

THIRD_PARTY = '''
from dataclasses import dataclass

from phaselens.plugin import CausalMetric, Condition, Edit, Params, param


@dataclass(frozen=True)
class Layers(Params):
    layer: int = param(0, help="the layer whose heads are silenced", minimum=0)
    seeds: int = param(0, help="repeats of the control", minimum=0)


class Silence(CausalMetric):
    """Heads off, at a layer given; the control leaves a position alone that depends on what a text says."""

    name, version, Params = "silence", "1", Layers

    def setup(self):
        self.seen = {}

    def hooks(self):
        return ["blocks.{layer}.attn.hook_z", "hook_embed"]

    def update(self, layer):
        expected = {"hook_embed"} if layer.index is None else {"attn.hook_z"}
        assert set(layer) == expected, set(layer)
        for text in layer.batch.texts:
            self.seen.setdefault(text, []).append(layer.index)

    def merge(self, other):
        super().merge(other)
        self.seen.update(other.seen)

    def conditions(self):
        self.warn(f"saw {len(self.seen)} texts")
        layer = self.params.layer
        point = f"blocks.{layer}.attn.hook_z"
        found = [Condition("silence", [Edit(point, 0.0)], layer=layer)]
        for seed in range(self.params.seeds):
            found.append(
                Condition("at random", [Edit(point, ByText(seed))], layer=layer, seed=seed, control_for="silence")
            )
        return found


@dataclass(frozen=True)
class ByText:
    """Zero in texts whose hash is even (or odd), so that a prompt's fate does not depend on its batch."""

    seed: int

    def __call__(self, tensor, site):
        assert len(site.batch.hashes) == tensor.shape[0]
        off = [int(each[:8], 16) % 2 == self.seed % 2 for each in site.batch.hashes]
        new = tensor.clone()
        new[off] = 0.0
        return new
'''


def word_tokenizer() -> Any:
    """Words and single digits, in the 67 ids of the tiny models: `<s>` 0, `</s>` 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *CONTENT, CUE]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def repeater(*, n_ctx: int = 128, label: str = "repeater") -> Any:
    """A lens on one layer of attention without position that spreads evenly: it says the token of CONTENT that stands
    most often in the text so far, and nothing in particular (all logits equal) where there is none. After CUE it says
    `blue`. In float64.
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
        for place in range(len(CONTENT)):
            embedding[FIRST + place] = 0.0
            embedding[FIRST + place, _READ + place] = 1.0
            layer.self_attn.v_proj.weight[place, _READ + place] = 1.0
            layer.self_attn.o_proj.weight[_WRITTEN + place, place] = 1.0
            logits[FIRST + place, _WRITTEN + place] = 10.0
        cue = FIRST + len(CONTENT)
        embedding[cue] = 0.0
        embedding[cue, _CUE] = 1.0
        logits[FIRST + CONTENT.index("blue"), _CUE] = 100.0
    return phaselens.load(model, label=label, tokenizer=word_tokenizer(), check=False)


def third_party(folder: Path) -> Path:
    """A file with a causal metric `silence`."""
    path = folder / "silence.py"
    path.write_text(THIRD_PARTY)
    return path
