"""The model to recalibrate: loaded, rotation nulled if asked for, frozen, with a trainable adapter."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tools.recalibrate.recipe import Recipe
from torch import Tensor, nn

from phaselens.lens import sources


class NullRotation(nn.Module):
    """Stands in for a rotary embedding: cos = its attention factor, sin = 0, whatever the positions."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """cos and sin in the shape and type that the rotary embedding returns."""
        cos, sin = self.rotary(x, position_ids, **kwargs)
        factor = float(getattr(self.rotary, "attention_scaling", 1.0))
        return torch.full_like(cos, factor), torch.zeros_like(sin)


def null_rotation(model: Any) -> None:
    """Null the rotation of a Llama-type model in place; weights and their names stay as they are.

    Raises:
        ValueError: for a model whose decoder has no `rotary_emb`.
    """
    if not isinstance(getattr(model.model, "rotary_emb", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no model.rotary_emb, whose rotation could be nulled; "
            "recalibrate a Llama-type model"
        )
    model.model.rotary_emb = NullRotation(model.model.rotary_emb)


def load(source: str, device: str = "cpu") -> tuple[Any, Any]:
    """The model in float32 and its tokenizer: by folder, hub id, or a name that `phaselens.load` takes.

    Raises:
        ValueError: for a tokenizer without a BOS token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sources.resolve(source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no BOS token, with which every sequence starts here")
    return model.to(device), tokenizer


def adapt(model: Any, recipe: Recipe) -> Any:
    """Prepare `model` for training in place, and return the peft model around it.

    The rotation is nulled if the recipe says so; all weights are frozen, those of linear modules inside the layers
    in the recipe's precision; the adapter is float32, its A drawn from the recipe's seed and its B zero.
    """
    from peft import LoraConfig, get_peft_model

    if recipe.positions == "nope":
        null_rotation(model)
    model.requires_grad_(False)
    norms = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, _ in model.model.layers.named_modules()
            if name.endswith("layernorm")
        }
    )
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
        modules_to_save=norms if recipe.norms else None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        # peft asks transformers by a name that is deprecated there.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config)
    if recipe.precision == "bf16":
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.bfloat16()
    return adapted


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
