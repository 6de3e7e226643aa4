"""Adapters of a model's weights, such as LoRA, applied by the package peft: merged into the weights, or kept apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phaselens.errors import ModelError
from phaselens.lens import headers, text_towers
from phaselens.lens.model_source import read_adapter_config
from phaselens.lens.pretrained import one_line
from phaselens.lens.reference import probe_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_NAME = "default"
# The largest accepted change of the logits by merging, relative to the largest logit: rounding, with much room.
_SAME_OUTPUT = 1e-3
# How peft says that a base has other weights than the adapter.
_MISFITS = ("size mismatch", "not found in the base model")
# How the first checkpoints of models of several modalities called the text model, and adapters trained on them.
_OLD_NAMES = {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head\.": "lm_head."}


def require_readable(folder: Path, name: str) -> None:
    """Check, by headers alone, that peft is installed and that an adapter can be read.

    Raises:
        ModelError: for a missing package, and for weights that are missing, damaged or pickled.
    """
    if find_spec("peft") is None:
        raise ModelError(
            f"model {name!r}: the package peft, which applies its adapter, is not installed; pip install "
            "'phaselens[peft]'"
        )
    headers.require_own_files(folder, name)
    read_adapter_config(folder, name)
    if not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise ModelError(
                f"model {name!r}: its adapter is stored as pickle ({_PICKLE}), which can run code when it is read; "
                "convert it to safetensors"
            )
        raise ModelError(f"model {name!r}: its adapter has no {_WEIGHTS}; copy it into {folder} too")
    headers.read_header(folder / _WEIGHTS, name)


def apply_adapter(model: PreTrainedModel, folder: Path, name: str, *, scale: float | None = None) -> str:
    """Add the adapter in `folder` to `model`, in place, and return a description for the model's facts.

    Args:
        model: a Hugging Face model with the weights that the adapter was trained on. An adapter of a model of several
            modalities is applied to its text model.
        folder: what peft has saved: `adapter_config.json` and `adapter_model.safetensors`.
        name: the model's name in error messages.
        scale: None merges the adapter into the weights. A number keeps it apart, multiplied by it: 0 is the base.

    Raises:
        ModelError: for an adapter that is damaged, made for another model, or does not change weights; for a merge that
            changes what the model computes; and for a scale of an adapter that replaces weights.
    """
    require_readable(folder, name)
    with _as_adapter_errors(name):
        adapted = _load(model, folder, name)
    config = adapted.peft_config[_NAME]
    description = f"{config.peft_type.value} adapter {folder.name}"
    if scale is not None:
        _scale(adapted, scale, name)
        return f"{description}, kept apart, scale {scale:g}"
    with _as_adapter_errors(name):
        separate_logits = _probe(model)
        merged_model = adapted.merge_and_unload(safe_merge=True)
        if merged_model is not model:
            model.set_output_embeddings(merged_model.get_output_embeddings())
        merged_logits = _probe(model)
    gap = float((merged_logits - separate_logits).abs().max() / separate_logits.abs().max())
    if gap > _SAME_OUTPUT:
        raise ModelError(
            f"model {name!r}: merged into its base, the adapter computes something else (logits differ by {gap:.2g}): "
            "the base is quantised, or shares an adapted weight with another module; keep the adapter apart: "
            "--adapter-scale 1"
        )
    return f"{description}, merged"


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every parameter of `model` to `dtype` in place; buffers, such as rotary frequencies, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _load(model: PreTrainedModel, folder: Path, name: str) -> Any:
    """Return peft's model around `model`, with the adapter's tensors, each of which has its place."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ModelError(
            f"model {name!r}: its adapter is {config.peft_type.value}, which adds tokens instead of changing weights; "
            "adapters of weights, such as LoRA, can be applied"
        )
    config.inference_mode = True
    full_model = text_towers.whole_around(model)
    if full_model is not None and any(
        "language_model." in key for key in headers.read_header(folder / _WEIGHTS, name)
    ):
        # Its names are those of the whole model, whose parts are the text model's own.
        text_name = text_towers.text_path(full_model)
        adapted = PeftModel(full_model, config, _NAME)
        result = adapted.load_adapter(
            str(folder), _NAME, torch_device=str(model.device), key_mapping=_OLD_NAMES
        )
        unexpected = [key for key in result.unexpected_keys if f"{text_name}." in key]
        model.set_output_embeddings(full_model.get_output_embeddings())
    else:
        adapted = PeftModel(model, config, _NAME)
        result = adapted.load_adapter(str(folder), _NAME, torch_device=str(model.device))
        unexpected = result.unexpected_keys
    missing = [key for key in result.missing_keys if f".{_NAME}" in key]
    misfits = [*unexpected, *missing]
    if misfits:
        side = "has no such weight" if unexpected else "is missing from the adapter"
        raise ModelError(
            f"model {name!r}: its adapter does not fit: {misfits[0]} {side}, and {len(misfits) - 1} more; the adapter "
            "was made for another model"
        )
    adapted.eval()
    return adapted


def _scale(adapted: Any, scale: float, name: str) -> None:
    """Multiply what the adapter adds by `scale`."""
    from peft import PeftType
    from peft.tuners.lora import LoraLayer

    config = adapted.peft_config[_NAME]
    replacing = {
        "modules_to_save": "stores whole modules (modules_to_save)",
        "trainable_token_indices": "stores whole rows of the embedding (trainable_token_indices)",
        "use_dora": "changes the length of weights (DoRA)",
    }
    reason = next((reason for field, reason in replacing.items() if getattr(config, field, None)), None)
    if config.peft_type != PeftType.LORA:
        reason = f"is {config.peft_type.value}, not LoRA"
    elif getattr(config, "bias", "none") != "none":
        reason = "stores biases"
    if reason is not None and scale != 1.0:
        raise ModelError(
            f"model {name!r}: its adapter {reason}, so that no scale leads from the base to it; leave --adapter-scale "
            "out, or use 1"
        )
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(_NAME, scale)


def _probe(model: PreTrainedModel) -> Tensor:
    """Return the logits [1, pos, d_vocab] of a few tokens, float64."""
    with torch.no_grad():
        logits: Tensor = model(probe_tokens(model), use_cache=False).logits
    return logits.double()


@contextmanager
def _as_adapter_errors(name: str) -> Iterator[None]:
    """Turn every error of peft into a ModelError of one line, and keep its warnings off the terminal."""
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if any(sign in str(error) for sign in _MISFITS):
            raise ModelError(
                f"model {name!r}: its adapter does not fit the base; the adapter was made for another model: "
                f"{one_line(error)}"
            ) from error
        raise ModelError(f"model {name!r}: its adapter cannot be applied: {one_line(error)}") from error
