"""The rotation of each layer: whether it has one, and the switch that nulls and restores it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from phaselens.errors import InputError, RefusedModel, require_flag, require_wholes
from phaselens.lens import families
from phaselens.lens.components import StreamingAttention, attention_layers, probe
from phaselens.lens.info import NO_ATTENTION, ModelInfo
from phaselens.lens.null_rotation import at_origin, rotates
from phaselens.lens.ownership import owned_call, owned_context
from phaselens.lens.points import HookFunction, in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_PROBE = 13
_TURNED = 0.02
"""Least relative difference between the keys of one residual at several positions that is a rotation, not rounding."""
# The keys: whether the embedding has learned positions, and whether the layer rotates.
_ENCODINGS = {
    (False, False): "nope",
    (False, True): "rope",
    (True, False): "learned",
    (True, True): "learned+rope",
}


class SwitchesRotation(TransformerBridge):
    """A bridge whose layers can be run with their rotation nulled: cos=1, sin=0.

    The attention factor by which YaRN and longrope multiply cos and sin is kept: every token is treated as if it were
    at position 0.
    """

    info: ModelInfo

    @property
    def nulled_layers(self) -> tuple[int, ...]:
        """The layers whose rotation is nulled at present."""
        return tuple(layer for layer, attention in attention_layers(self).items() if attention.nulled)

    @owned_call
    def set_rotation(self, layers: int | Iterable[int] | None = None, *, nulled: bool) -> tuple[int, ...]:
        """Null the rotation of some layers, or restore it; `info.positions` follows.

        A layer without any rotation, or in the requested state already, stays as it is.

        Args:
            layers: one layer or several, counted from 0; None for all.
            nulled: True nulls, False restores.

        Returns:
            The layers that changed.

        Raises:
            InputError: for a layer that the model does not have.
            RefusedModel: for a layer whose positions are not given as cos and sin; no layer has changed then.

        >>> import phaselens
        >>> from phaselens.testing import tiny_model
        >>> lens = phaselens.load(tiny_model("llama"))
        >>> lens.set_rotation(1, nulled=True), lens.info.positions
        ((1,), ('rope', 'nope'))
        >>> lens.set_rotation(nulled=False), lens.info.positions
        ((1,), ('rope', 'rope'))
        """
        require_flag("nulled", nulled)
        chosen_layers = self._require_layers(layers)
        if nulled:
            changed = [
                layer for layer in chosen_layers if self.info.positions[layer] not in ("nope", NO_ATTENTION)
            ]
            if changed:
                self._null(changed)
        else:
            nulled_before = self.nulled_layers
            changed = [layer for layer in chosen_layers if layer in nulled_before]
            self._set_nulled(set(nulled_before) - set(changed))
        return tuple(changed)

    @owned_context
    @contextmanager
    def nulled_rotation(self, layers: int | Iterable[int] | None = None) -> Iterator[None]:
        """Null the rotation of exactly these layers inside the context, and put back the earlier state at its end.

        Args:
            layers: as in `set_rotation`; an empty list restores every rotation.
        """
        nulled_before = self.nulled_layers
        nulled_inside = self._require_layers(layers)
        try:
            self.set_rotation(set(nulled_before) - set(nulled_inside), nulled=False)
            self.set_rotation(nulled_inside, nulled=True)
            yield
        finally:
            self._set_nulled(nulled_before)

    def _null(self, layers: Sequence[int]) -> None:
        """Null the rotation of `layers`, and check that positions then no longer affect them."""
        attentions = attention_layers(self)
        family = self.info.family
        for layer in layers:
            origin = attentions[layer].origin
            if origin is not None and rotates(origin):
                raise RefusedModel(
                    f"{family}: positions=nope cannot be served: layer {layer} rotates position 0 as well, so it "
                    "isn't a rotation by position alone; use positions='auto'"
                )
        try:
            for layer in layers:
                attentions[layer].nulled = True
            encodings = detect_rotation(self)
            unchanged = [layer for layer in layers if encodings[layer] != "nope"]
            if unchanged:
                raise RefusedModel(
                    f"{family}: positions=nope cannot be served: layer {unchanged[0]} has "
                    f"{self.info.positions[unchanged[0]]!r} positions, which are not given as cos and sin; only "
                    "rotary models can be nulled; use positions='auto'"
                )
        except BaseException:  # Ctrl-C too: either all of the layers are nulled, or none
            for layer in layers:
                attentions[layer].nulled = False
            raise
        self.info = replace(self.info, positions=encodings)

    def _set_nulled(self, layers: Collection[int]) -> None:
        """Null exactly `layers`, each of which was nulled before, and restore all others."""
        encodings = list(self.info.positions)
        for layer, attention in attention_layers(self).items():
            if attention.nulled != (layer in layers):
                attention.nulled = layer in layers
                encodings[layer] = "nope" if attention.nulled else "rope"
        self.info = replace(self.info, positions=tuple(encodings))

    def _require_layers(self, layers: int | Iterable[int] | None) -> list[int]:
        n_layers = self.info.n_layers
        if layers is None:
            return list(range(n_layers))
        numbers = list(layers) if isinstance(layers, Iterable) else [layers]
        require_wholes("layers", numbers)
        for layer in numbers:
            if not 0 <= layer < n_layers:
                raise InputError(f"layer {layer}: {self.info.label} has layers 0 to {n_layers - 1}")
        return sorted(set(map(int, numbers)))


def detect_rotation(lens: HookedTransformer) -> tuple[str, ...]:
    """Return the position encoding of each layer, measured.

    It is `rope`, `nope`, `learned`, `alibi` (a bias of the scores for each key), `relative` (one for each query and
    key) or several of them, joined by `+`; `none` for a layer without attention.

    The same random residuals go through every layer twice, with positions 0, 1, 2… and with 0, 2, 4…. The keys of a
    layer that rotates differ between the two passes; those of other layers are equal. A module may also count positions
    itself (RoFormer). In a third pass, each layer gets one residual at all positions; the keys of a layer that rotates
    then differ between positions. Each layer also stores its cos and sin at position 0, for
    `SwitchesRotation.set_rotation`.

    Raises:
        RefusedModel: for attention that bypasses transformers' attention interface.
    """
    model = lens.original_model
    attentions = attention_layers(lens)
    n_layers = len(lens.blocks)
    tokens = torch.arange(_PROBE, device=lens.device)[None] % families.d_vocab_of(model)
    #: What enters the first layer in each pass.
    embedded: list[Tensor] = []
    keys: tuple[dict[int, Tensor], ...] = ({}, {}, {})

    def put_random(layer: int, *, constant: bool) -> HookFunction:
        def put(residual: Tensor, hook: object) -> Tensor:
            if layer == 0:
                embedded.append(residual.detach().clone())
            generator = torch.Generator().manual_seed(layer)
            numbers = torch.randn(residual.shape, generator=generator)
            if constant:
                numbers = numbers[:, :1].expand_as(numbers)
            return numbers.to(residual, copy=True)

        return put

    def keep_keys(forward_index: int, layer: int) -> HookFunction:
        return lambda key, hook: keys[forward_index].__setitem__(layer, key)

    for forward_index, (stride, constant) in enumerate(((1, False), (2, False), (1, True))):
        ids = stride * torch.arange(_PROBE, device=tokens.device)[None]
        hooks = [
            (in_layer(layer, "hook_in"), put_random(layer, constant=constant)) for layer in range(n_layers)
        ]
        hooks += [
            (in_layer(layer, "attn.hook_rot_k"), keep_keys(forward_index, layer)) for layer in attentions
        ]
        handles = [
            attention.register_forward_pre_hook(_keep_origin, with_kwargs=True)
            for attention in attentions.values()
        ]
        try:
            # A layer may read the embeddings as well as the residual (Zamba): they are then the same at all positions.
            probe(lens, torch.ones_like(tokens) if constant else tokens, hooks, position_ids=ids)
        finally:
            for handle in handles:
                handle.remove()

    is_equal = torch.allclose(embedded[0], embedded[1], rtol=0.0, atol=0.0, equal_nan=True)
    has_learned_positions = hasattr(lens, "pos_embed") or not is_equal
    encodings = []
    for layer in range(n_layers):
        if layer not in attentions:
            encodings.append(NO_ATTENTION)
            continue
        if any(layer not in keys_of_pass for keys_of_pass in keys):
            raise RefusedModel(
                f"{model.config.model_type}: attention of layer {layer} does not go through transformers' attention "
                "interface, so its rows cannot be measured; use a family listed in docs/families.md"
            )
        rotates = _differ_between_positions(keys[2][layer]) or not torch.allclose(
            keys[0][layer], keys[1][layer], rtol=0.0, atol=0.0, equal_nan=True
        )
        encoding = _ENCODINGS[has_learned_positions, rotates]
        bias = attentions[layer].score_bias
        if bias is not None:
            added = "alibi" if bias.shape[2] == 1 else "relative"
            encoding = added if encoding == "nope" else f"{encoding}+{added}"
        encodings.append(encoding)
    return tuple(encodings)


def _differ_between_positions(key: Tensor) -> bool:
    """Return whether keys [1, pos, head, d_head] of one residual differ, far beyond rounding and the first positions.

    A convolution over positions starts with other values, which it leaves behind after a few positions.
    """
    settled = key[0, _PROBE // 2 :].double()
    gap = float((settled - settled[:1]).abs().max())
    return gap > _TURNED * float(settled.abs().max())


def _keep_origin(attention: StreamingAttention, _args: object, kwargs: dict[str, Any]) -> None:
    """Store an attention component's cos and sin at position 0; a forward pre-hook."""
    origin = at_origin(kwargs.get("position_embeddings"))
    if origin is not None:
        attention.origin = origin
