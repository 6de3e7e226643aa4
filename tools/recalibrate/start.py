"""Start a recalibration from what another one has learned: a checkpoint, or the folder of a finished adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tools.recalibrate.recipe import RecalibrationRecipe

from phaselens.lens.digests import sha256

WEIGHTS = "adapter_model.safetensors"


def starting_from(recipe: RecalibrationRecipe, start: Path) -> RecalibrationRecipe:
    """Return `recipe` with the record of the checkpoint, or the adapter's folder, that it starts from.

    Raises:
        ValueError: for an adapter of another shape, or trained with the other encoding of positions.
    """
    earlier, tokens = _facts_of_adapter(start) if start.is_dir() else _facts_of_checkpoint(start)
    for name, earlier_value in earlier.items():
        value = getattr(recipe, name)
        if (set(value) if name == "targets" else value) != earlier_value:
            raise ValueError(f"{start}: trained with {name} {earlier_value}, not {value}")
    weights = start / WEIGHTS if start.is_dir() else start
    return recipe.replace(start_sha256=sha256(weights), start_tokens=tokens)


def _facts_of_checkpoint(path: Path) -> tuple[dict[str, Any], int]:
    earlier = RecalibrationRecipe.read(path.parent.parent / "recipe.json")
    facts = {name: getattr(earlier, name) for name in ("positions", "rank", "alpha", "norms")}
    return {**facts, "targets": set(earlier.targets)}, (
        earlier.start_tokens + int(path.stem) * earlier.batch_tokens
    )


def _facts_of_adapter(folder: Path) -> tuple[dict[str, Any], int]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, "pt") as stored:
        metadata = stored.metadata()
    facts = {
        "positions": metadata["positions"],
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "norms": bool(config["modules_to_save"]),
        "targets": set(config["target_modules"]),
    }
    return facts, int(metadata["trained_tokens"])


def starting_values(start: Path, device: torch.device) -> Mapping[str, torch.Tensor]:
    """Return the adapter's values by the names of the parameters that are trained."""
    if not start.is_dir():
        values: dict[str, torch.Tensor] = torch.load(start, map_location=device, weights_only=True)[
            "parameters"
        ]
        return values
    # peft stores an adapter without the name, `default`, by which its modules keep it.
    stored = load_file(start / WEIGHTS, str(device))
    return {_with_adapter_name(name): tensor for name, tensor in stored.items()}


def _with_adapter_name(name: str) -> str:
    module, _, weight = name.rpartition(".")
    is_low_rank = module.endswith(("lora_A", "lora_B"))
    return f"{module}.default.{weight}" if is_low_rank else f"{module}.modules_to_save.default.{weight}"
