"""Rotary frequencies that depend on how long a text is, computed for each text as if it stood alone.

Under two of transformers' rope types the frequencies follow from the longest position of the batch: ``dynamic``
stretches them once a text exceeds the trained length, and keeps them in the model; ``longrope`` has one set for short
texts and one for long ones. A text's values would then depend on the texts beside it and before it. Here each text
gets the frequencies of its own length, by the model's own code, and nothing is left in the model.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from phaselens.errors import InputError
from phaselens.lens.components import mixed
from phaselens.lens.rows import Rows


def length_dependent(model: nn.Module) -> list[Any]:
    """The rotary modules of a model whose frequencies depend on a text's length."""
    return [
        module for module in model.modules() if any(map(_is_length_dependent, _rope_types(module).values()))
    ]


def make_independent(model: nn.Module, rows: Rows) -> None:
    """Give each text of a batch the frequencies of its own length, from now on. `rows` knows the texts' lengths."""
    for module in length_dependent(model):
        mixed(module, PerTextFrequencies)
        module.__dict__["rows"] = rows
        reset(module)


def reset(module: Any) -> None:
    """Put a rotary module into the state of a model that has not run yet."""
    for layer_type in _rope_types(module):
        prefix = "" if layer_type is None else f"{layer_type}_"
        current, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
        # A copy, since transformers writes into it, and one that it may still write into after `inference_mode`.
        with torch.inference_mode(False):
            setattr(module, f"{prefix}inv_freq", original.to(current.device).clone())
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def regime(module: Any, length: int, layer_type: str | None = None) -> Hashable:
    """What a text's length means to the frequencies: they are equal where this is.

    >>> from phaselens.testing import tiny_model
    >>> dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    >>> (module,) = length_dependent(tiny_model("llama", max_position_embeddings=32, rope_parameters=dynamic))
    >>> [regime(module, length) for length in (5, 32, 33, 40)]
    [32, 32, 33, 40]
    """
    rope_type = _rope_types(module)[layer_type]
    if "dynamic" in rope_type:
        return max(length, int(module.original_max_seq_len))
    if rope_type == "longrope":
        return length > trained_length(module, layer_type)
    return None


def trained_length(module: Any, layer_type: str | None = None) -> int:
    """The longest text whose frequencies are the original ones."""
    if _rope_types(module)[layer_type] == "longrope":
        parameters = module.config.rope_parameters
        own = parameters if layer_type is None else parameters[layer_type]
        return int(own["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def same_regime(model: nn.Module, first: int, second: int) -> bool:
    """Whether texts of these two lengths are rotated by the same frequencies in every layer."""
    return all(
        regime(module, first, layer_type) == regime(module, second, layer_type)
        for module in length_dependent(model)
        for layer_type in _rope_types(module)
    )


def far_position(model: nn.Module) -> int | None:
    """A position from which on frequencies may differ from those of a short text; None without any rotation."""
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
    config: Any = model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _FAR)


_FAR = 8192
"""Where a rotary model does not say for how many positions it was made."""


class PerTextFrequencies:
    """Mixed into a rotary module: cos and sin of each text by the frequencies of its own length."""

    rows: Rows

    def forward(
        self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each [batch or 1, pos, d_rotary], of position ids [batch or 1, pos]."""
        lengths = self.rows.text_lengths(position_ids)
        # A pad may stand at a position that its text does not reach, and would count as a longer text.
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
            part = self._of_one_regime(x, position_ids[rows], layer_type)
            if cos_sin is None:
                shape = (len(regimes), *part[0].shape[1:])
                cos_sin = (part[0].new_empty(shape), part[1].new_empty(shape))
            for whole, values in zip(cos_sin, part, strict=True):
                whole[rows] = values
        assert cos_sin is not None
        return cos_sin

    def _of_one_regime(
        self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None
    ) -> tuple[Tensor, Tensor]:
        """What the model's own module gives; nothing is left in it for the texts of the next call."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        try:
            return super().forward(x, position_ids, **options)  # type: ignore[misc]
        finally:
            reset(self)

    def _require_fitting_cache(
        self: Any, position_ids: Tensor, regimes: list[Hashable], layer_type: str | None
    ) -> None:
        """Refuse to mix keys of two rotations: those in a cache were rotated by the frequencies of a shorter text."""
        if not self.rows.running or not self.rows.n_past:
            return
        before = [regime(self, length, layer_type) for length in position_ids[:, 0].tolist()]
        if before != regimes:
            kind = _rope_types(self)[layer_type]
            raise InputError(
                f"the text grows beyond {trained_length(self, layer_type)} tokens, where {kind} rotation changes for "
                "all positions, but its cached keys keep the old one; run it without a cache (use_past_kv_cache=False "
                "in TransformerLens, use_cache=False in transformers)"
            )


def _rope_types(module: Any) -> dict[str | None, str]:
    """The rope type by layer type, or under None where all layers share one; empty for what is no rotary module."""
    # Its own attributes only: a bridge passes those of the module that it wraps through.
    own = vars(module).keys() | vars(module).get("_buffers", {}).keys()
    rope_type = vars(module).get("rope_type")
    if "original_max_seq_len" not in own:
        return {}
    if isinstance(rope_type, dict):
        return {name: kind for name, kind in rope_type.items() if f"{name}_original_inv_freq" in own}
    return {None: rope_type} if isinstance(rope_type, str) and "original_inv_freq" in own else {}


def _is_length_dependent(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"
