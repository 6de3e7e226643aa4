"""A hand-built network whose loss depends on one cell of queries and keys, and reference edits by whole forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tests.toys import toy_tokenizer

#: The head that attends to the first word, and the dimension that makes it do so.
LAYER, HEAD, DIMENSION = 1, 2, 3
#: The word that follows each first word throughout a text.
ANNOUNCED = {"a": "w", "b": "x", "c": "y", "d": "z"}
_MARK, _CONSTANT, _OUT = 4, 5, 8
_D_HEAD = 8


def needle_texts() -> list[str]:
    """Return texts of a first word and repeats of the word that it announces, of several lengths."""
    return [
        f"{first_word} " + " ".join([word] * (24 + 6 * index))
        for index, (first_word, word) in enumerate(ANNOUNCED.items())
    ]


def needle_model(*, key: float = 60.0) -> Any:
    """Return a float64 Llama that predicts every word from the first one, by one cell of one head's queries and keys.

    In this cell all queries are large, and the key of the first word alone is; nothing else writes to the residual
    stream. All other cells of all heads hold small numbers that depend on the words.
    """
    from phaselens.testing import tiny_model

    model = tiny_model("llama", dtype=torch.float64, attention_bias=True)
    generator = torch.Generator().manual_seed(1)
    first_ids = toy_tokenizer()(" ".join(ANNOUNCED))["input_ids"][1:]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in projection.parameters():
                    parameter.zero_()
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.normal_(0.0, 0.25, generator=generator)
                projection.bias.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0.0, 0.5, generator=generator)
        embedding[:, : _OUT + len(first_ids)] = 0.0
        embedding[:, _CONSTANT] = 20.0
        for index, token in enumerate(first_ids):
            embedding[token, [index, _MARK]] = 20.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.normal_(0.0, 0.02, generator=generator)
        attention = model.model.layers[LAYER].self_attn
        row = HEAD * _D_HEAD + DIMENSION
        attention.q_proj.weight[row] = 0.0
        attention.q_proj.bias[row] = 20.0
        attention.k_proj.weight[row] = 0.0
        attention.k_proj.weight[row, _MARK] = key / 3.25  # the value there in a first word's normalised row
        for index, word in enumerate(ANNOUNCED.values()):
            attention.v_proj.weight[HEAD * _D_HEAD + index, index] = 1.0
            attention.o_proj.weight[_OUT + index, HEAD * _D_HEAD + index] = 20.0
            model.lm_head.weight[toy_tokenizer()(word)["input_ids"][1], _OUT + index] = 3.0
    return model


def needle_lens(**options: Any) -> Any:
    """Return a lens around `needle_model`, with the toy tokenizer for texts."""
    import phaselens

    lens = phaselens.load(needle_model(**options), label="needle", check=False)
    lens.text_tokenizer = toy_tokenizer()
    return lens


def ids_of(lens: Any, text: str) -> torch.Tensor:
    """Return token ids [1, pos]."""
    return torch.tensor([lens.text_tokenizer(text)["input_ids"]])


def states(
    lens: Any, text: str, points: Sequence[str], hooks: Sequence[tuple[str, Any]] = ()
) -> dict[str, np.ndarray]:
    """Return the activations [pos, head, d_head] of one text at `points`, under `hooks`."""
    activations: dict[str, np.ndarray] = {}

    def keep(point: str) -> Any:
        return lambda tensor, hook: activations.__setitem__(point, tensor[0].double().numpy().copy())

    recording = [(point, keep(point)) for point in points]
    with torch.no_grad():
        lens.run_with_hooks(ids_of(lens, text), fwd_hooks=[*recording, *hooks])
    return {point: activations[point] for point in points}


def write(cells: np.ndarray, values: np.ndarray | None = None) -> Callable[..., torch.Tensor]:
    """Return a TransformerLens hook that writes zero, or values, into cells [head, d_head]."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        tensor = tensor.clone()
        for head, dimension in np.argwhere(cells):
            tensor[:, :, head, dimension] = 0.0 if values is None else values[head, dimension]
        return tensor

    return hook


def naive_loss(lens: Any, text: str, hooks: Sequence[tuple[str, Any]] = ()) -> float:
    """Return the mean loss of one text by a whole forward of TransformerLens and torch's cross-entropy."""
    ids = ids_of(lens, text)
    with torch.no_grad():
        logits = lens.run_with_hooks(ids, fwd_hooks=list(hooks))
    return float(functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


def top_cells(norms: np.ndarray) -> np.ndarray:
    """Return the largest cell of each head, bool [head, d_head]."""
    return np.asarray(norms == norms.max(-1, keepdims=True))


def pooled(states_by_text: Sequence[Mapping[str, np.ndarray]], point: str) -> np.ndarray:
    """Return the norm [head, d_head] of each cell over all tokens of several texts."""
    return np.asarray(
        np.sqrt((np.concatenate([text_states[point] for text_states in states_by_text]) ** 2).sum(0))
    )
