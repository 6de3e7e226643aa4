"""Per layer: how attention knows positions, and what it multiplies scores by. How far it sees is in `visibility`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens import families
from phaselens.lens.components import each_attention, probe

_PROBE = 9


def null_rotation(lens: Any, layers: Any = None, *, before: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Null the rotation (cos=1, sin=0) of `layers`, by default all; what has none is left as it is.

    The attention factor by which YaRN and longrope multiply cos and sin is kept: every token is treated as if it stood
    at position 0.

    Args:
        before: what `detect` says of the lens as it stands, where that is known.

    Returns:
        What `detect` says of the lens afterwards.

    Raises:
        RefusedModel: where a layer's rotation does not come in as cos and sin, so that nulling would change nothing.
    """
    attentions = each_attention(lens)
    chosen = range(len(attentions)) if layers is None else layers
    before = detect(lens) if before is None else before
    for layer in chosen:
        origin = attentions[layer].origin
        if origin is not None and bool(origin[1].any()):
            raise RefusedModel(
                f"{lens.original_model.config.model_type}: positions=nope cannot be served: layer {layer} rotates "
                "position 0 as well, so its rotation is not one of cos and sin of the position"
            )
    for layer in chosen:
        attentions[layer].nulled = True
    after = detect(lens)
    left = [layer for layer, kind in enumerate(after) if layer in chosen and kind != "nope"]
    if left:
        for layer in chosen:
            attentions[layer].nulled = False
        family = lens.original_model.config.model_type
        raise RefusedModel(
            f"{family}: positions=nope cannot be served: layer {left[0]} has {before[left[0]]!r} positions, which do "
            "not come in as cos and sin; only rotary models can be nulled"
        )
    return after


def restore_rotation(lens: Any, layers: Any = None) -> None:
    """Undo `null_rotation`."""
    attentions = each_attention(lens)
    for layer in range(len(attentions)) if layers is None else layers:
        attentions[layer].nulled = False


def detect(lens: Any) -> tuple[str, ...]:
    """What each layer does with positions, found by trying: `rope`, `nope`, `learned` or `learned+rope`.

    The same residuals go through every layer twice, with positions 0, 1, 2… and with 0, 2, 4…; queries and keys of a
    layer that rotates differ, those of one that does not are the same. Each layer also notes its cos and sin at
    position 0, for `null_rotation`.
    """
    model = lens.original_model
    attentions: list[Any] = [*each_attention(lens)]
    n_layers = len(lens.blocks)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_PROBE, device=lens.device)[None] % vocabulary
    residuals: dict[int, Tensor] = {}
    keys: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

    def keep_residual(layer: int) -> Any:
        return lambda residual, hook: residuals.__setitem__(layer, residual)

    def put_residual(layer: int) -> Any:
        return lambda _residual, hook: residuals[layer]

    def keep_origin(layer: int) -> Any:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            embeddings = kwargs.get("position_embeddings")
            if isinstance(embeddings, tuple) and len(embeddings) == 2:
                cos, sin = (part[..., :1, :].detach().clone() for part in embeddings)
                attentions[layer].origin = cos, sin

        return hook

    def keep_keys(run: int, layer: int) -> Any:
        return lambda key, hook: keys[run].__setitem__(layer, key)

    for run, (stride, at_entry) in enumerate(((1, keep_residual), (2, put_residual))):
        ids = stride * torch.arange(_PROBE, device=tokens.device)[None]
        hooks = [(f"blocks.{layer}.hook_in", at_entry(layer)) for layer in range(n_layers)]
        hooks += [(f"blocks.{layer}.attn.hook_rot_k", keep_keys(run, layer)) for layer in range(n_layers)]
        noting = [
            attention.register_forward_pre_hook(keep_origin(layer), with_kwargs=True)
            for layer, attention in enumerate(attentions)
        ]
        try:
            probe(lens, tokens, hooks, position_ids=ids)
        finally:
            for handle in noting:
                handle.remove()

    family = model.config.model_type
    learned = hasattr(lens, "pos_embed")
    kinds = []
    for layer in range(n_layers):
        if layer not in keys[0] or layer not in keys[1]:
            raise RefusedModel(
                f"{family}: attention of layer {layer} does not go through transformers' attention interface, so its "
                "rows cannot be measured; use a family listed in docs/families.md"
            )
        first, second = keys[0][layer], keys[1][layer]
        rotated = not torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
        kinds.append(
            ("learned+rope" if rotated else "learned") if learned else ("rope" if rotated else "nope")
        )
    return tuple(kinds)


def scale_of(module: Any, config: Any) -> float:
    """What q·k is multiplied by before the softmax."""
    scale = getattr(module, "scaling", None)
    return float(scale) if scale is not None else families.d_head_of(module, config) ** -0.5


def softcap_of(module: Any) -> float | None:
    """What an attention module caps its scores at, whatever its configuration says; None where it does not."""
    softcap = getattr(module, "attn_logit_softcapping", None)
    return None if softcap is None else float(softcap)
