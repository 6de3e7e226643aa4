"""Models with a known truth: one head or dimension is made to do exactly one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Required, TypedDict

from phaselens.errors import InputError, close_matches, require_text, require_whole
from phaselens.testing.models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer
    from phaselens.testing.models import TinyModel

#: The layer, head, residual dimension and position where the truth is planted.
LAYER, HEAD, DIMENSION, POSITION = 1, 2, 5, 7
#: A character of the tiny tokenizer that planted texts contain once, at POSITION.
_MARK = "Z"
_D_HEAD = 8
# The dimension with the lowest rotation frequency: over a hundred positions its cosine stays above 0.99.
_SLOWEST = _D_HEAD // 2 - 1
_STRENGTH = 1e3


@dataclass(frozen=True)
class Planted:
    """A lens, a text for it, and the truth that was planted in the model.

    `layer` and `head` are where it was planted, `position` is the key or token that it concerns and `dimension` the
    residual dimension; each is None if it does not apply. `statement` is the truth in words.
    """

    lens: HookedTransformer
    text: str
    statement: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    dimension: int | None = None


class Facts(TypedDict, total=False):
    """The fields of `Planted` that a recipe sets."""

    statement: Required[str]
    layer: int
    head: int
    position: int
    dimension: int


def plant(kind: str, *, positions: str = "auto", seed: int = 0) -> Planted:
    """Create a float64 model with one of the truths in `PLANTED`.

    Args:
        kind: what to plant, for instance `"pure sink"`.
        positions: `"auto"` for a rotary model, `"nope"` for the same model with its rotation switched off.
        seed: seed of the weights that stay random.

    Raises:
        InputError: for a kind that is not in `PLANTED`.

    >>> truth = plant("uniform head")
    >>> truth.statement
    'head 2 of layer 1 attends equally to all tokens that it sees'
    """
    require_text("kind", kind)
    require_whole("seed", seed, 0)
    if kind not in _RECIPES:
        raise InputError(f"no planted truth {kind!r}; {close_matches(kind, _RECIPES)}")
    import torch

    from phaselens.lens import load

    model = tiny_model("llama", seed=seed, dtype=torch.float64, attention_bias=True)
    with torch.no_grad():
        facts = _RECIPES[kind](model)
    lens = load(
        model, label=kind.replace(" ", "-"), tokenizer=tiny_tokenizer(), positions=positions, check=False
    )
    text = "to be or not to be that is the question"
    return Planted(lens, text[: POSITION - 1] + _MARK + text[POSITION - 1 :], **facts)


def _uniform(model: TinyModel) -> Facts:
    """Set the queries of one head to zero, so that its scores are zero."""
    _silence_queries(model, [LAYER], [HEAD])
    return {
        "layer": LAYER,
        "head": HEAD,
        "statement": f"head {HEAD} of layer {LAYER} attends equally to all tokens that it sees",
    }


def _all_uniform(model: TinyModel) -> Facts:
    heads = range(model.config.num_attention_heads)
    _silence_queries(model, range(model.config.num_hidden_layers), heads)
    return {"statement": "every head attends equally to all tokens that it sees"}


def _pure_sink(model: TinyModel) -> Facts:
    _attract(model, token=0)
    return {
        "layer": LAYER,
        "head": HEAD,
        "position": 0,
        "dimension": DIMENSION,
        "statement": f"head {HEAD} of layer {LAYER} attends to position 0 only",
    }


def _sink_at_position(model: TinyModel) -> Facts:
    _attract(model, token=tiny_tokenizer().convert_tokens_to_ids(_MARK))
    return {
        "layer": LAYER,
        "head": HEAD,
        "position": POSITION,
        "dimension": DIMENSION,
        "statement": f"from position {POSITION} on, head {HEAD} of layer {LAYER} attends to it only",
    }


def _massive_dimension(model: TinyModel) -> Facts:
    """Give one dimension the same large value at every token; nothing else writes to it."""
    _reserve(model)
    model.get_input_embeddings().weight[:, DIMENSION] = _STRENGTH
    return {
        "dimension": DIMENSION,
        "statement": f"residual dimension {DIMENSION} is {_STRENGTH:g} at every token",
    }


def _massive_token(model: TinyModel) -> Facts:
    _reserve(model)
    model.get_input_embeddings().weight[0, DIMENSION] = _STRENGTH
    return {
        "position": 0,
        "dimension": DIMENSION,
        "statement": f"residual dimension {DIMENSION} is {_STRENGTH:g} at position 0, and 0 elsewhere",
    }


_RECIPES: dict[str, Callable[[TinyModel], Facts]] = {
    "uniform head": _uniform,
    "uniform attention": _all_uniform,
    "pure sink": _pure_sink,
    "sink at position 7": _sink_at_position,
    "massive dimension": _massive_dimension,
    "massive token": _massive_token,
}
#: Kinds of truths that `plant` can plant.
PLANTED: tuple[str, ...] = tuple(_RECIPES)


def _rows(head: int) -> slice:
    return slice(head * _D_HEAD, (head + 1) * _D_HEAD)


def _silence_queries(model: TinyModel, layers: Iterable[int], heads: Iterable[int]) -> None:
    for layer in layers:
        projection = model.model.layers[layer].self_attn.q_proj
        for head in heads:
            projection.weight[_rows(head)] = 0.0
            projection.bias[_rows(head)] = 0.0


def _reserve(model: TinyModel) -> None:
    """Reserve one residual dimension for the truth: it is zero at every token, and no layer writes to it."""
    model.get_input_embeddings().weight[:, DIMENSION] = 0.0
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[DIMENSION] = 0.0
            if projection.bias is not None:
                projection.bias[DIMENSION] = 0.0


def _attract(model: TinyModel, token: int) -> None:
    """Make one head attend to `token`: its keys are large there and zero elsewhere, and all queries match them."""
    _reserve(model)
    model.get_input_embeddings().weight[token, DIMENSION] = _STRENGTH
    _silence_queries(model, [LAYER], [HEAD])
    layer = model.model.layers[LAYER]
    row = HEAD * _D_HEAD + _SLOWEST
    layer.input_layernorm.weight[DIMENSION] = 1.0
    layer.self_attn.q_proj.bias[row] = _STRENGTH
    layer.self_attn.k_proj.weight[_rows(HEAD)] = 0.0
    layer.self_attn.k_proj.bias[_rows(HEAD)] = 0.0
    layer.self_attn.k_proj.weight[row, DIMENSION] = 1.0
