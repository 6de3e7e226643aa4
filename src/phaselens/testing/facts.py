"""A `ModelInfo` of a model that does not exist, for metrics that are called without a model."""

from __future__ import annotations

from typing import Any

from phaselens.errors import require_text, require_whole
from phaselens.plugin import ModelInfo, RotatedPairs


def model_info(*, n_layers: int = 2, n_heads: int = 4, positions: str = "rope", **fields: Any) -> ModelInfo:
    """Create a `ModelInfo` without a model: `model_info(n_layers=3, windows=(7, None, None))`."""
    for name, value in (("n_layers", n_layers), ("n_heads", n_heads), ("d_head", fields.get("d_head", 8))):
        require_whole(name, value, 1)
    require_text("positions", positions)
    facts: dict[str, Any] = {
        "label": "imagined",
        "source": "imagined",
        "family": "imagined",
        "architecture": "Imagined",
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": 8,
        "d_model": 8 * n_heads,
        "d_vocab": 67,
        "n_ctx": None,
        "positions": (positions,) * n_layers,
        "windows": (None,) * n_layers,
        "scales": (8**-0.5,) * n_layers,
        "softcap": None,
        "dtype": "float32",
        "device": "cpu",
        "attention_path": "none",
        "bos_token_id": 0,
        "bos_policy": "tokenizer adds BOS",
    }
    facts |= fields
    half = facts["d_head"] // 2
    pairs = tuple((low, low + half) for low in range(half))
    angles = tuple(10000.0 ** (-low / half) for low in range(half))
    halves = RotatedPairs(pairs, facts["d_head"], angles=angles, factor=1.0, entries=pairs)
    rotations = tuple(halves if "rope" in encoding else None for encoding in facts["positions"])
    return ModelInfo(**{"rotations": rotations, "head_outputs": ("same",) * n_layers} | facts)
