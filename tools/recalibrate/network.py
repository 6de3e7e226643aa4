"""The model to recalibrate: loaded, its rotation nulled if requested, frozen, with a trainable adapter."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tools.recalibrate.recipe import RecalibrationRecipe
from tools.train_pair.model import null_rotation
from torch import nn

from phaselens.lens import checkpoints, packaged
from phaselens.lens.model_source import ModelSource


def load(source: str, device: str = "cpu") -> tuple[Any, Any]:
    """Return the model in float32 and its tokenizer: by folder, hub id, or a name that `phaselens.load` takes.

    Raises:
        ModelError: for a model that does not exist, or whose checkpoint lacks some of its weights.
        ValueError: for a model that already has an adapter, and for a tokenizer without a BOS token.
    """
    from transformers import AutoTokenizer

    _refuse_adapter(source)
    model_source = ModelSource.identify(source)
    model = checkpoints.load_pretrained(model_source, torch.float32, torch.device(device))
    model.set_attn_implementation("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(model_source.location)
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"{source}: its tokenizer has no BOS token, with which every training sequence starts"
        )
    return model, tokenizer


def _refuse_adapter(source: str) -> None:
    """Raise ValueError for a model that has an adapter already: only its base model would be loaded."""
    twin = packaged.MODELS.get(source)
    if twin is None or twin.adapter is None:
        return
    base = next(
        name
        for name, model in packaged.MODELS.items()
        if model.adapter is None and model.package == twin.package
    )
    raise ValueError(
        f"{source} is {base} with an adapter, on which no second one can be trained; recalibrate {base}"
    )


def adapt(model: Any, recipe: RecalibrationRecipe) -> Any:
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
        # peft uses a name of transformers that is deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config)
    if recipe.precision == "bf16":
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.bfloat16()
    return adapted


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
