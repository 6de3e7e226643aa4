"""Adapters that peft has made and saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")


def save_adapter(model: Any, folder: Path, *, seed: int = 0, config: Any = None, **fields: Any) -> Any:
    """Save a random adapter of `model` into `folder`; return peft's own model, which computes with it.

    Args:
        model: a Hugging Face model, which is changed.
        config: a configuration of peft; by default, LoRA of rank 3 with these fields.
    """
    config = config or peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()
