"""Rotary frequencies that depend on a text's length, computed for each text as if it were alone.

Under two of transformers' rope types the longest position of the batch determines the frequencies: ``dynamic``
stretches them once a text exceeds the trained length, and keeps them in the model; ``longrope`` has one set for short
texts and one for long ones. A text's values would then depend on the texts beside it and before it. This module gives
each text the frequencies of its own length, by the model's own code, and leaves the model unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phaselens.errors import InputError
from phaselens.lens import families
from phaselens.lens.components import mix_in
from phaselens.lens.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def length_dependent(model: nn.Module) -> list[Any]:
    """Return the rotary modules of a model whose frequencies depend on a text's length."""
    return [
        module for module in model.modules() if any(map(_is_length_dependent, _rope_types(module).values()))
    ]


def make_independent(model: nn.Module, rows: Rows) -> None:
    """Give each text of a batch the frequencies of its own length, in all later forwards.

    Args:
        rows: the source of the texts' lengths.
    """
    for module in length_dependent(model):
        mix_in(module, PerTextFrequencies)
        module.__dict__["rows"] = rows
        reset(module)


def reset(module: nn.Module) -> None:
    """Put a rotary module into the state of a model that has not run yet."""
    for layer_type in _rope_types(module):
        prefix = _prefix(layer_type)
        current, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
        # transformers writes into the tensor, so it gets a copy, made so that writing works after `inference_mode`.
        with torch.inference_mode(False):
            setattr(module, f"{prefix}inv_freq", original.to(current.device).clone())
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def regime(module: Any, length: int, layer_type: str | None = None) -> Hashable:
    """Return the part of a text's length that the frequencies depend on: texts of equal regime have equal frequencies.

    >>> from phaselens.testing import tiny_model
    >>> dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    >>> (module,) = length_dependent(tiny_model("llama", max_position_embeddings=32, rope_parameters=dynamic))
    >>> [regime(module, length) for length in (5, 32, 33, 40)]
    [32, 32, 33, 40]
    """
    rope_type = _rope_types(module)[layer_type]
    if families.is_stretched_rope(rope_type):
        return max(length, int(module.original_max_seq_len))
    if families.is_two_set_rope(rope_type):
        return length > trained_length(module, layer_type)
    return None


def trained_length(module: Any, layer_type: str | None = None) -> int:
    """Return the length of the longest text with the original frequencies."""
    if families.is_two_set_rope(_rope_types(module)[layer_type]):
        return families.n_ctx_before_rope(module, layer_type)
    return int(module.original_max_seq_len)


def same_regime(model: nn.Module, length: int, other_length: int) -> bool:
    """Return whether texts of these two lengths are rotated by the same frequencies in every layer."""
    return all(
        regime(module, length, layer_type) == regime(module, other_length, layer_type)
        for module in length_dependent(model)
        for layer_type in _rope_types(module)
    )


def far_position(model: PreTrainedModel) -> int | None:
    """Return the first position where frequencies may differ from a short text's; None without any rotation."""
    dependent = length_dependent(model)
    if dependent:
        return max(
            trained_length(module, layer_type)
            for module in dependent
            for layer_type, rope_type in _rope_types(module).items()
            if _is_length_dependent(rope_type)
        )
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return None
    return families.n_ctx_of(model) or _FAR


_FAR = 8192
"""The far position of a rotary model that states no trained length."""


class PerTextFrequencies(nn.Module):
    """Mixin for a rotary module: cos and sin of each text by the frequencies of its own length."""

    rows: Rows

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [batch or 1, pos, d_rotary], of position ids [batch or 1, pos]."""
        lengths = self.rows.text_lengths(position_ids)
        # A pad's position may lie beyond its text, which would then count as a longer one.
        position_ids = position_ids.minimum(lengths[:, None] - 1)
        regimes = [regime(self, length, layer_type) for length in lengths.tolist()]
        self._require_fitting_cache(position_ids, regimes, layer_type)
        groups: dict[Hashable, list[int]] = {}
        for row, value in enumerate(regimes):
            groups.setdefault(value, []).append(row)
        if len(groups) == 1:
            return self._of_one_regime(x, position_ids, layer_type)
        cos_sin: tuple[Tensor, Tensor] | None = None
        for rows in groups.values():
            group_cos_sin = self._of_one_regime(x, position_ids[rows], layer_type)
            if cos_sin is None:
                shape = (len(regimes), *group_cos_sin[0].shape[1:])
                cos_sin = (group_cos_sin[0].new_empty(shape), group_cos_sin[1].new_empty(shape))
            for batch_values, values in zip(cos_sin, group_cos_sin, strict=True):
                batch_values[rows] = values
        assert cos_sin is not None
        return cos_sin

    def _of_one_regime(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None
    ) -> tuple[Tensor, Tensor]:
        """Return the model's own cos and sin, and reset its module for the next texts."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        try:
            cos, sin = super().forward(x, position_ids, **options)
            return cos, sin
        finally:
            reset(self)

    def _require_fitting_cache(
        self, position_ids: Tensor, regimes: list[Hashable], layer_type: str | None
    ) -> None:
        """Raise InputError where a text outgrows the frequencies by which its cached keys were rotated."""
        if not self.rows.running or not self.rows.n_past:
            return
        cached_regimes = [regime(self, length, layer_type) for length in position_ids[:, 0].tolist()]
        if cached_regimes != regimes:
            rope_type = _rope_types(self)[layer_type]
            raise InputError(
                f"the text grows beyond {trained_length(self, layer_type)} tokens, where {rope_type} rotation changes "
                "for all positions, but its cached keys keep the old one; run it without a cache "
                "(use_past_kv_cache=False in TransformerLens, use_cache=False in transformers)"
            )


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Return the rope type by layer type, under None if all layers share one; empty if `module` is not rotary."""
    # Only the module's own attributes: a bridge also has those of the module that it wraps.
    own_names = vars(module).keys() | vars(module).get("_buffers", {}).keys()
    if "original_max_seq_len" not in own_names:
        return {}
    return {
        layer_type: rope_type
        for layer_type, rope_type in families.rope_types_of(module).items()
        if f"{_prefix(layer_type)}original_inv_freq" in own_names
    }


def _prefix(layer_type: str | None) -> str:
    """Return what precedes the names of a layer type's state in its rotary module."""
    return "" if layer_type is None else f"{layer_type}_"


def _is_length_dependent(rope_type: str) -> bool:
    """Return whether the frequencies of this rope type depend on a text's length."""
    return families.is_stretched_rope(rope_type) or families.is_two_set_rope(rope_type)
