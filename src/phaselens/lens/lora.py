"""Merge a low-rank adapter in peft's format into a model's weights, without peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_LOW_RANK = (".lora_A.weight", ".lora_B.weight")
# Variants that give an adapter's two matrices another meaning; merging them as W + scale·B·A would be wrong.
_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def merge_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Add `scale · B · A` to each weight that the adapter in `folder` names, in place.

    A tensor stored in full (peft's `modules_to_save`, such as a norm's gain) replaces the model's own.

    Args:
        model: a Hugging Face model in float32, [out, in] weights named as when the adapter was trained.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: the model's name in error messages.

    Raises:
        ModelError: for an adapter that is damaged, of a variant other than plain LoRA, or made for other weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r}: its adapter in {folder} cannot be read ({error}); reinstall phaselens"
        ) from error
    if variants := [key for key in _VARIANTS if config.get(key)]:
        raise ModelError(
            f"model {name!r}: its adapter uses {', '.join(variants)}; only plain LoRA can be merged here, so merge it "
            "with peft and load the merged folder"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for target, (stored, is_product) in _updates(tensors, name).items():
            weight = parameters.get(target)
            if weight is None or weight.shape != stored.shape:
                shape = "no such weight" if weight is None else f"{tuple(weight.shape)}"
                raise ModelError(
                    f"model {name!r}: its adapter changes {target} {tuple(stored.shape)}, and the model has {shape}; "
                    "the adapter was made for another model"
                )
            if is_product:
                weight.add_(stored.to(weight.device), alpha=scale)
            else:
                weight.copy_(stored)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every parameter of `model` to `dtype` in place; buffers, such as rotary frequencies, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _updates(tensors: dict[str, Tensor], name: str) -> dict[str, tuple[Tensor, bool]]:
    """Map a parameter's name to B·A and True, or to a tensor that replaces it and False; float32."""
    updates: dict[str, tuple[Tensor, bool]] = {}
    for key, tensor in tensors.items():
        target = key.removeprefix(_PREFIX)
        if target.endswith(_LOW_RANK[0]):
            module = target.removesuffix(_LOW_RANK[0])
            b = tensors.get(f"{_PREFIX}{module}{_LOW_RANK[1]}")
            if b is None or b.shape[1] != tensor.shape[0]:
                raise ModelError(
                    f"model {name!r}: its adapter has a LoRA A for {module} but no matching B; reinstall phaselens"
                )
            updates[f"{module}.weight"] = (b.float() @ tensor.float(), True)
        elif not target.endswith(_LOW_RANK[1]):
            updates[target] = (tensor.float(), False)
    return updates
