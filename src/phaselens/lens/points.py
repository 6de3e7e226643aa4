"""The registry of hook points: the name, shape, meaning and properties of each, declared once.

The lens, the plugin API, patching, runs, completion and `phaselens hooks` read it. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from phaselens.errors import require_text, require_whole
from phaselens.lens.point_declaration import PointDeclaration

if TYPE_CHECKING:
    from torch import Tensor

HookFunction = Callable[["Tensor", Any], "Tensor | None"]
"""A function `(tensor, hook)` on a hook point; the tensor that it returns replaces the activation."""
Hook = tuple[str, HookFunction]
"""The name of a hook point, and the function to hook there."""

N_DISTANCES = 64
"""The default number of distances of `hook_distance`."""

_RESIDUAL = ("batch", "pos", "d_model")
_BY_HEAD = ("batch", "pos", "head", "d_head")
_BY_KV_HEAD = ("batch", "pos", "kv_head", "d_head")
_ROTARY = ("1", "pos", "d_rotary")
_ROWS = ("batch", "head", "query")
_MATRIX = ("batch", "head", "query", "key")


def _statistic(
    name: str,
    dimensions: tuple[str, ...],
    meaning: str,
    quantity: Literal["scores", "attention"],
    *,
    is_of_sink: bool = False,
) -> PointDeclaration:
    return PointDeclaration(
        f"attn.{name}",
        dimensions,
        f"{meaning}; read only",
        quantity,
        is_statistic=True,
        is_of_sink=is_of_sink,
        needs_own_attention=True,
    )


_DECLARATIONS = (
    PointDeclaration("hook_embed", _RESIDUAL, "token embedding"),
    PointDeclaration(
        "hook_pos_embed",
        ("1", "pos", "d_model"),
        "learned position embedding",
        exists_in="models with learned positions",
    ),
    PointDeclaration("hook_resid_pre", _RESIDUAL, "residual stream entering the layer"),
    PointDeclaration(
        "hook_resid_mid",
        _RESIDUAL,
        "residual stream between attention and MLP; edits reach the skip path",
        computed_after="attention",
        exists_in="blocks that run attention and MLP one after the other",
    ),
    PointDeclaration(
        "hook_resid_post",
        _RESIDUAL,
        "residual stream leaving the layer",
        computed_after="mlp",
    ),
    PointDeclaration(
        "hook_attn_out",
        _RESIDUAL,
        "what attention adds to the residual stream",
        computed_after="attention",
    ),
    PointDeclaration(
        "hook_mlp_out",
        _RESIDUAL,
        "what the MLP adds to the residual stream",
        computed_after="mlp",
    ),
    PointDeclaration(
        "hook_mixer_out",
        _RESIDUAL,
        "what a layer's state space, linear attention or convolution adds to the residual stream",
        computed_after="attention",
        exists_in="layers with something else instead of attention, or beside it",
    ),
    PointDeclaration(
        "hook_loss",
        ("batch", "pos"),
        "loss of each token given those before it, nats; NaN for a text's first token and for pads; read only",
        "loss",
        is_statistic=True,
    ),
    PointDeclaration("attn.hook_q", _BY_HEAD, "queries, before norms and rotation"),
    PointDeclaration("attn.hook_k", _BY_KV_HEAD, "keys, before norms and rotation"),
    PointDeclaration("attn.hook_v", _BY_KV_HEAD, "values"),
    PointDeclaration("attn.hook_rot_q", _BY_HEAD, "queries as used in q·k: after norms and rotation"),
    PointDeclaration("attn.hook_rot_k", _BY_KV_HEAD, "keys as used in q·k: after norms and rotation"),
    PointDeclaration("attn.hook_cos", _ROTARY, "cosines of the rotation", exists_in="models with a rotation"),
    PointDeclaration("attn.hook_sin", _ROTARY, "sines of the rotation", exists_in="models with a rotation"),
    _statistic("hook_lse", _ROWS, "log-sum-exp of the row's scores, nats", "scores"),
    _statistic(
        "hook_sink",
        _ROWS,
        "fraction of the row's attention on key 0, or on the requested key",
        "attention",
        is_of_sink=True,
    ),
    _statistic(
        "hook_learned_sink",
        _ROWS,
        "fraction of the row's attention on its head's learned sink logit, which is no key; 0 without one",
        "attention",
    ),
    _statistic("hook_itself", _ROWS, "fraction of the row's attention on the query's own key", "attention"),
    _statistic("hook_entropy", _ROWS, "entropy of the row's attention, nats", "attention"),
    _statistic(
        "hook_received",
        ("batch", "head", "key"),
        "attention that a key receives, summed over queries",
        "attention",
    ),
    _statistic(
        "hook_distance",
        ("batch", "head", "distance"),
        f"attention by distance from the query back to the key, summed over queries; {N_DISTANCES} distances, or the "
        "requested number",
        "attention",
    ),
    _statistic("hook_segments", (*_ROWS, "segment"), "attention by segment of keys", "attention"),
    _statistic(
        "hook_largest_product", _ROWS, "largest product q·k of the row by size, without scale", "scores"
    ),
    _statistic("hook_top_key", (*_ROWS, "2"), "position of the largest weight, number of ties", "attention"),
    PointDeclaration(
        "attn.hook_key_scores",
        ("batch", "head", "query", "named_key"),
        "scores before the softmax on key 0, on the requested key, or on the keys that an edit names; an edit "
        "renormalises the rows of the queries after the key, and builds no matrix",
        "scores",
        is_of_sink=True,
        needs_own_attention=True,
        computed_after="rotation",
    ),
    PointDeclaration(
        "attn.hook_attn_scores",
        _MATRIX,
        "scores before the softmax; builds the matrix in this layer",
        "scores",
    ),
    PointDeclaration(
        "attn.hook_pattern",
        _MATRIX,
        "attention after the softmax; builds the matrix in this layer",
        "attention",
    ),
    PointDeclaration(
        "attn.hook_attended",
        _BY_HEAD,
        "what each head reads: its attention times the values, before any norm or gate that follows",
        needs_own_attention=True,
        computed_after="rotation",
    ),
    PointDeclaration(
        "attn.hook_z",
        _BY_HEAD,
        "input of the output projection, by head, after such a norm or gate",
        computed_after="rotation",
    ),
    PointDeclaration(
        "hook_normalized",
        _RESIDUAL,
        "activations divided by their norm, before the norm's weights",
    ),
    PointDeclaration("hook_scale", ("batch", "pos", "1"), "divisor of the norm"),
)
_BY_NAME = {declared.name: declared for declared in _DECLARATIONS}


def _attention_points(declarations: Iterable[PointDeclaration]) -> tuple[str, ...]:
    """Return the points' names within the attention component."""
    return tuple(declared.name.removeprefix("attn.") for declared in declarations)


STATISTICS = _attention_points(
    declared for declared in _DECLARATIONS if declared.is_statistic and declared.needs_own_attention
)
"""Names of the streamed statistics within a layer's attention."""
OWN_ATTENTION_POINTS = _attention_points(
    declared for declared in _DECLARATIONS if declared.needs_own_attention
)
"""Names, within attention, of the points that fire only where the model's own attention runs."""
ROTATED_POINTS = ("hook_rot_q", "hook_rot_k")
"""Names, within attention, of the queries and the keys after their norms and rotation."""

_IN_LAYER = re.compile(r"blocks\.(\d+|\{layer\})\.(.+)")
_IN_HEAD_NORM = re.compile(r"\.attn\.\w*norm\w*\.")
_FINAL_NORM = "ln_final."
_NORMS = (_FINAL_NORM, "ln1.", "ln2.")
# Not in the registry, so that `phaselens hooks` lists them with the inner points; the last two name the same tensor.
_LOGIT_POINTS = ("unembed.hook_in", "unembed.hook_out", "hook_unembed")
_COMPONENTS_AFTER_ATTENTION = ("ln1_post.", "ln2.", "ln2_post.", "mlp.")


def layer_and_point(name: str) -> tuple[int | None, str]:
    """Return the layer of a hook name, and the point's name within it; None and the whole name outside of the layers.

    >>> layer_and_point("blocks.3.attn.hook_q"), layer_and_point("hook_embed")
    ((3, 'attn.hook_q'), (None, 'hook_embed'))
    """
    match = _IN_LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match and match[1] != "{layer}" else (None, name)


def layer_of(name: str) -> int | None:
    """Return the layer of a hook name; None outside of the layers."""
    return layer_and_point(name)[0]


def in_each_layer(pattern: str, n_layers: int) -> list[str]:
    """Return the hook names that match `pattern`: one for each layer if it contains `{layer}`, else itself.

    >>> in_each_layer("blocks.{layer}.hook_mlp_out", 2), in_each_layer("hook_embed", 2)
    (['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out'], ['hook_embed'])
    """
    if "{layer}" not in pattern:
        return [pattern]
    return [pattern.replace("{layer}", str(layer)) for layer in range(n_layers)]


def in_layer(layer: int | str, point: str) -> str:
    """Return the full name of a layer's hook point. `layer` is an index, or the text `{layer}` for every layer.

    >>> in_layer(3, "attn.hook_z"), in_layer("{layer}", "hook_mlp_out")
    ('blocks.3.attn.hook_z', 'blocks.{layer}.hook_mlp_out')
    """
    if not isinstance(layer, str):
        require_whole("layer", layer, 0)
    require_text("point", point)
    return f"blocks.{layer}.{point}"


def points_in_layer(patterns: Iterable[str], layer: int | None) -> Iterator[str]:
    """Yield the patterns' points that are in `layer`, named within it; with None, the points outside of the layers.

    >>> list(points_in_layer(["blocks.{layer}.attn.hook_q", "blocks.1.hook_mlp_out", "hook_embed"], 0))
    ['attn.hook_q']
    """
    for pattern in patterns:
        match = _IN_LAYER.fullmatch(pattern)
        if match is None:
            if layer is None:
                yield pattern
        elif match[1] in ("{layer}", str(layer)):
            yield match[2]


@cache
def declaration(name: str) -> PointDeclaration | None:
    """Return the registry's entry for a hook name, whole or within its layer; None for the inner points of components.

    >>> declaration("blocks.0.ln1.hook_scale").meaning, declaration("blocks.0.mlp.hook_in")
    ('divisor of the norm', None)
    """
    match = _IN_LAYER.fullmatch(name)
    point = match[2] if match else name
    if point.startswith(_NORMS):
        point = point.split(".", 1)[1]
        return _BY_NAME.get(point) if "." not in point else None
    return _BY_NAME.get(point)


def dimensions(name: str) -> tuple[str, ...]:
    """Return the declared dimensions of the tensor at a hook point; empty for a point that the registry does not have.

    >>> dimensions("blocks.0.attn.hook_rot_k"), dimensions("blocks.0.mlp.hook_in")
    (('batch', 'pos', 'kv_head', 'd_head'), ())
    """
    declared = declaration(name)
    return () if declared is None else declared.dimensions


def heads_at(name: str) -> Literal["head", "kv_head"] | None:
    """Return which heads the tensor at a hook point has: `head` (of queries), `kv_head` (of keys and values), or None.

    >>> heads_at("blocks.0.attn.hook_pattern"), heads_at("blocks.0.attn.hook_v"), heads_at("blocks.0.hook_mlp_out")
    ('head', 'kv_head', None)
    """
    axes = dimensions(name)
    return "head" if "head" in axes else "kv_head" if "kv_head" in axes else None


def is_editable(name: str) -> bool:
    """Return whether the model depends on the tensor at the point, as it does on all but the statistics of attention.

    >>> is_editable("blocks.{layer}.attn.hook_sink"), is_editable("blocks.0.attn.hook_pattern")
    (False, True)
    """
    declared = declaration(name)
    return declared is None or declared.is_editable


def read_only_reason(name: str) -> str:
    """Return the reason why the point cannot be edited, as part of a message, or "" if it can.

    >>> read_only_reason("blocks.0.hook_mlp_out"), read_only_reason("blocks.0.attn.hook_sink").split(";")[0]
    ('', 'it is a measurement that nothing in the model depends on')
    """
    declared = declaration(name)
    if declared is None or declared.is_editable:
        return ""
    in_its_place = "hook_key_scores, hook_pattern or hook_attn_scores"
    if declared.quantity == "loss":
        in_its_place = "an activation that it depends on"
    return f"it is a measurement that nothing in the model depends on; edit {in_its_place} instead"


def depends_on_sink_position(name: str) -> bool:
    """Return whether the values at the point are those of one sink position; another one needs another forward."""
    declared = declaration(name)
    return declared is not None and declared.is_of_sink


def is_matrix(name: str) -> bool:
    """Return whether the tensor at the point is an attention matrix [batch, head, query, key]."""
    declared = declaration(name)
    return declared is not None and declared.is_matrix


def names_keys(name: str) -> bool:
    """Return whether an edit at the point can name keys: the scores of named keys, or a column of a matrix.

    >>> names_keys("blocks.0.attn.hook_key_scores"), names_keys("blocks.0.attn.hook_z")
    (True, False)
    """
    return is_key_scores(name) or is_matrix(name)


def is_key_scores(name: str) -> bool:
    """Return whether the tensor at the point has the scores of the keys that its hooks name."""
    return "named_key" in dimensions(name)


def is_attention(name: str) -> bool:
    """Return whether the values at the point are attention after the softmax, or a statistic of it."""
    declared = declaration(name)
    return declared is not None and declared.quantity == "attention"


def is_logits(name: str) -> bool:
    """Return whether the point fires only in a forward that computes logits."""
    return name in _LOGIT_POINTS


def is_in_final_norm(name: str) -> bool:
    """Return whether the point is inside the final norm, which follows the last layer."""
    return name.startswith(_FINAL_NORM)


def is_in_head_norm(name: str) -> bool:
    """Return whether the point is inside a norm of queries or keys."""
    return _IN_HEAD_NORM.search(name) is not None


def is_after_attention(point: str) -> bool:
    """Return whether an edit at a point, named within its layer, leaves what the layer's attention computes unchanged.

    >>> is_after_attention("hook_attn_out"), is_after_attention("mlp.hook_in"), is_after_attention("attn.hook_z")
    (True, True, False)
    """
    declared = _BY_NAME.get(point)
    if declared is not None:
        return declared.computed_after in ("attention", "mlp")
    return point == "attn.hook_out" or point.startswith(_COMPONENTS_AFTER_ATTENTION)


def is_after_rotation(point: str) -> bool:
    """Return whether an edit at a point, named within its layer, leaves the layer's queries, keys and values unchanged.

    >>> is_after_rotation("attn.hook_z"), is_after_rotation("attn.hook_v")
    (True, False)
    """
    declared = _BY_NAME.get(point)
    return (declared is not None and declared.computed_after == "rotation") or is_after_attention(point)


def is_after_mlp(point: str) -> bool:
    """Return whether an edit at a point, named within its layer, leaves what the layer's MLP computes unchanged."""
    declared = _BY_NAME.get(point)
    return declared is not None and declared.computed_after == "mlp"
