"""Hand-built networks in which a known layer's MLP matters at position 0, for a known reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.toys import WORDS, toy_tokenizer

#: Residual dimensions: BOS alone has START; writers alone write WRITTEN; all other tokens have CONTENT; the reader
#: writes READ, which changes the logits.
START, WRITTEN, CONTENT, READ = 0, 1, 2, 3
WRITER, SHRINKER, READER = 1, 2, 3
#: Amount that each layer would write at position 0 if START were the whole stream there.
ALONE = {WRITER: 200.0}
THREE = {0: 100.0, 1: 380.0, 2: 1200.0}  # about 100 each
LAST = {WRITER: 100.0, READER: 1000.0}


def bos_model(*, writers: Mapping[int, float] = ALONE, shrinks: bool = True) -> Any:
    """Return a Llama in float64 whose loss depends on position 0 only through what `writers` write there.

    The MLPs of `writers` add to position 0 only. With `shrinks`, the MLP of layer 2 adds exactly nothing to position 0
    and removes most of the norm of all other positions, as in DroPE's Llama-2-7B: the ratio is then largest after
    layer 2, which writes nothing. The last layer attends uniformly, and reads what the writers wrote. All other
    attention and MLP outputs are exactly zero.
    """
    from phaselens.testing import tiny_model

    model = tiny_model("llama", num_hidden_layers=4, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                weight.zero_()
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
        embedding = model.get_input_embeddings().weight
        embedding.mul_(0.5 / embedding.std())
        embedding[:, : READ + 1] = 0.0
        embedding[1:, CONTENT] = 20.0
        embedding[0, START] = 60.0
        model.model.norm.weight.fill_(1.0)
        logits = model.lm_head.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
        # READ and WRITTEN favour letters over the tokens that occur in no text.
        logits[:, [WRITTEN, READ]] = -0.5
        logits[3 : 3 + len(WORDS), [WRITTEN, READ]] = 0.5
        for writer, amount in writers.items():
            _unit(model, writer, reads=START, writes=WRITTEN, amount=amount)
        if shrinks:
            _unit(model, SHRINKER, reads=CONTENT, writes=CONTENT, amount=-0.9 * 20.0)
        attention = model.model.layers[READER].self_attn
        attention.v_proj.weight[:, WRITTEN] = 1.0
        attention.o_proj.weight[READ] = 1.0
    return model


def bos_lens(**options: Any) -> Any:
    """Return a lens around `bos_model`, with the toy tokenizer for texts."""
    import phaselens

    lens = phaselens.load(bos_model(**options), label="planted", check=False)
    lens.text_tokenizer = toy_tokenizer()
    return lens


def _unit(model: Any, layer: int, *, reads: int, writes: int, amount: float) -> None:
    """Set one unit of a layer's MLP: it writes about `amount` where `reads` is the whole stream, 0 without it."""
    mlp = model.model.layers[layer].mlp
    # A row that has `reads` alone has √d_model there after normalisation.
    normalised = model.config.hidden_size**0.5
    mlp.gate_proj.weight[0, reads] = 10.0
    mlp.up_proj.weight[0, reads] = 1.0
    mlp.down_proj.weight[writes, 0] = amount / (10.0 * normalised * normalised)
