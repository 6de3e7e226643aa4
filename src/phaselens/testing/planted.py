"""Models in which the truth is known: a head or a dimension was made to do exactly one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phaselens.errors import InputError, close_matches, require_text, require_whole
from phaselens.testing.models import tiny_model, tiny_tokenizer

#: Where the truth is planted.
LAYER, HEAD, DIMENSION, POSITION = 1, 2, 5, 7
#: A character of the tiny tokenizer that planted texts contain once, at POSITION.
_MARK = "Z"
_D_HEAD = 8
# The lowest frequency of the rotation turns least: over a hundred positions its cosine stays above 0.99.
_SLOWEST = _D_HEAD // 2 - 1
_STRENGTH = 1e3


@dataclass(frozen=True)
class Planted:
    """A lens, a text for it, and what is true of them.

    `layer` and `head` are where it was planted, `position` is the key or token that it concerns and `dimension` the
    residual dimension, each None where it concerns none. `says` puts it into words.
    """

    lens: Any
    text: str
    says: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    dimension: int | None = None


def plant(kind: str, *, positions: str = "auto", seed: int = 0) -> Planted:
    """A planted truth, in float64: one of `PLANTED`.

    Args:
        kind: what to plant, for instance `"pure sink"`.
        positions: `"auto"` for a rotary model, `"nope"` for the same with its rotation nulled.
        seed: of the weights that are left random.

    >>> truth = plant("uniform head")
    >>> truth.says
    'head 2 of layer 1 attends to all that it sees alike'
    """
    require_text("kind", kind)
    require_whole("seed", seed, 0)
    if kind not in _MAKERS:
        raise InputError(f"no planted truth {kind!r}; {close_matches(kind, _MAKERS)}")
    import torch

    from phaselens.lens import load

    model = tiny_model("llama", seed=seed, dtype=torch.float64, attention_bias=True)
    with torch.no_grad():
        facts = _MAKERS[kind](model)
    lens = load(
        model, label=kind.replace(" ", "-"), tokenizer=tiny_tokenizer(), positions=positions, check=False
    )
    text = "to be or not to be that is the question"
    return Planted(lens, text[: POSITION - 1] + _MARK + text[POSITION - 1 :], **facts)


def _uniform(model: Any) -> dict[str, Any]:
    """Queries of one head are zero, and so are its scores."""
    _silence_queries(model, [LAYER], [HEAD])
    return {
        "layer": LAYER,
        "head": HEAD,
        "says": f"head {HEAD} of layer {LAYER} attends to all that it sees alike",
    }


def _all_uniform(model: Any) -> dict[str, Any]:
    heads = range(model.config.num_attention_heads)
    _silence_queries(model, range(model.config.num_hidden_layers), heads)
    return {"says": "every head attends to all that it sees alike"}


def _pure_sink(model: Any) -> dict[str, Any]:
    _attract(model, token=0)
    return {
        "layer": LAYER,
        "head": HEAD,
        "position": 0,
        "dimension": DIMENSION,
        "says": f"head {HEAD} of layer {LAYER} gives position 0 all its attention",
    }


def _sink_at_position(model: Any) -> dict[str, Any]:
    _attract(model, token=tiny_tokenizer().convert_tokens_to_ids(_MARK))
    return {
        "layer": LAYER,
        "head": HEAD,
        "position": POSITION,
        "dimension": DIMENSION,
        "says": f"from position {POSITION} on, head {HEAD} of layer {LAYER} gives it all its attention",
    }


def _massive_dimension(model: Any) -> dict[str, Any]:
    """Every token has the same large number there, and nothing else writes to it."""
    _reserve(model)
    model.get_input_embeddings().weight[:, DIMENSION] = _STRENGTH
    return {"dimension": DIMENSION, "says": f"residual dimension {DIMENSION} is {_STRENGTH:g} at every token"}


def _massive_token(model: Any) -> dict[str, Any]:
    _reserve(model)
    model.get_input_embeddings().weight[0, DIMENSION] = _STRENGTH
    return {
        "position": 0,
        "dimension": DIMENSION,
        "says": f"residual dimension {DIMENSION} is {_STRENGTH:g} at position 0, and 0 elsewhere",
    }


_MAKERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "uniform head": _uniform,
    "uniform attention": _all_uniform,
    "pure sink": _pure_sink,
    "sink at position 7": _sink_at_position,
    "massive dimension": _massive_dimension,
    "massive token": _massive_token,
}
PLANTED: tuple[str, ...] = tuple(_MAKERS)


def _rows(head: int) -> slice:
    return slice(head * _D_HEAD, (head + 1) * _D_HEAD)


def _silence_queries(model: Any, layers: Any, heads: Any) -> None:
    for layer in layers:
        projection = model.model.layers[layer].self_attn.q_proj
        for head in heads:
            projection.weight[_rows(head)] = 0.0
            projection.bias[_rows(head)] = 0.0


def _reserve(model: Any) -> None:
    """Keep one residual dimension for the truth: no token has anything in it, no layer writes to it."""
    model.get_input_embeddings().weight[:, DIMENSION] = 0.0
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[DIMENSION] = 0.0
            if projection.bias is not None:
                projection.bias[DIMENSION] = 0.0


def _attract(model: Any, token: int) -> None:
    """One head's keys are large where `token` stands and zero elsewhere, and all its queries look for such keys."""
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
