"""Quantised checkpoints: the packages that read them, where they are loaded, and the dtype in which they compute."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phaselens.errors import ModelError
from phaselens.lens import families
from phaselens.lens.precision import LIMITS
from phaselens.lens.weights import stored_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Packages by method, as pip calls them, and the modules by which their presence is known. Of any other method,
# transformers' own error names the package.
_PACKAGES: dict[str, dict[str, str]] = {
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "hqq": {"hqq": "hqq"},
    "torchao": {"torchao": "torchao"},
}
# Methods that refuse to be told that all modules belong on the CPU, where they are anyway.
_WITHOUT_CPU_MAP = ("hqq",)
# Half precision holds every value of bfloat16, but for its range; so the coarser one is tried first.
_HALF = (torch.bfloat16, torch.float16)
# The number of jumps in the layers below that may add up in one value.
_N_JUMPS = 16
# Inputs by which a module is measured, their relative change, and the relative change of an output that is a jump.
_N_INPUTS = 64
_TINY = 1e-5
_JUMP = 1e-3


def method_of(config: PreTrainedConfig) -> str | None:
    """Return the method by which a checkpoint's weights are quantised; None where they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        stored = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = fields.get("quant_method")
    # The oldest checkpoints of bitsandbytes do not name it.
    is_unnamed = method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit"))
    return "bitsandbytes" if is_unnamed else str(getattr(method, "value", method) or "unknown")


def require_package(config: PreTrainedConfig, name: str) -> None:
    """Check that what reads a quantised checkpoint is installed.

    Raises:
        ModelError: with the missing packages, and for a method that transformers does not know.
    """
    method = method_of(config)
    if method is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise ModelError(
            f"model {name!r}: its weights are quantised by {method!r}, which transformers does not know; it knows "
            f"{', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )
    missing = [package for package, module in _PACKAGES.get(method, {}).items() if not _is_installed(module)]
    if missing:
        raise ModelError(
            f"model {name!r}: its weights are quantised by {method}, and {' and '.join(missing)}, which reads them, is "
            f"not installed; pip install 'phaselens[{method}]'"
        )
    if method == "bitsandbytes":
        # It logs a line at every product.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return find_spec(package) is not None and (package == module or find_spec(module) is not None)


def placement(config: PreTrainedConfig, device: torch.device) -> dict[str, Any] | None:
    """Return the argument of `from_pretrained` that loads a quantised model on `device`, without a move afterwards;
    None for a model that is not quantised."""
    if method_of(config) is None:
        return None
    if device.type == "cpu" and method_of(config) in _WITHOUT_CPU_MAP:
        return {}
    return {"device_map": {"": device}}


def description_of(model: PreTrainedModel) -> str | None:
    """Return the method by which a loaded model's weights were quantised, and whether they still are; None if never."""
    method = method_of(model.config)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        return method
    settings = quantiser.quantization_config
    named = method or str(getattr(settings.quant_method, "value", settings.quant_method))
    return f"{named}, dequantised" if getattr(settings, "dequantize", False) else named


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes.

    Attributes:
        dtype: the coarsest dtype in which a module computes.
        jump: how far an output jumps, relative to the largest, where a module rounds its input further and a tiny
            change tips an entry to the next step; 0 where none does.
    """

    dtype: torch.dtype
    jump: float = 0.0

    @property
    def rounds_inputs(self) -> bool:
        """Whether a module rounds its input further than the dtype does."""
        return self.jump > 0

    @property
    def limit(self) -> float:
        """The largest difference that rounding alone makes between two computations of one quantity, relative."""
        return max(LIMITS[self.dtype], _N_JUMPS * self.jump)


def has_packed_weights(model: PreTrainedModel) -> bool:
    """Return whether a linear module stores its weight in a format that cannot be split like a plain tensor."""
    return any(
        type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()
        for module in model.modules()
        if families.linear_width_of(module) is not None
        and isinstance(weight := getattr(module, "weight", None), Tensor)
    )


def measure_arithmetic(model: PreTrainedModel) -> Arithmetic:
    """Return how a model computes, measured on one linear module of each kind that has no plain weight.

    A module that casts its input to half precision returns values that half precision holds exactly. One that rounds
    its input further answers to a tiny change of it with a jump.
    """
    dtype = families.embedding_of(model).dtype
    is_quantised = method_of(model.config) is not None
    if is_quantised:
        # Some modules are unpacked by the first forward of the whole model (compressed-tensors).
        with torch.no_grad():
            model(torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    examples: dict[tuple[type, type], nn.Module] = {}
    for module in model.modules():
        is_foreign = is_quantised or type(module).__module__.partition(".")[0] not in (
            "torch",
            "transformers",
        )
        is_linear = families.linear_width_of(module) is not None and not _holds_embedding(module)
        if is_foreign and is_linear and stored_matrix(module) is None:
            kind = (type(module), type(getattr(module, "weight", None)))
            examples.setdefault(kind, module)
    measured = [_arithmetic_of(module, dtype) for module in examples.values()]
    return Arithmetic(
        max((dtype, *(arithmetic.dtype for arithmetic in measured)), key=lambda candidate: LIMITS[candidate]),
        max((arithmetic.jump for arithmetic in measured), default=0.0),
    )


def _holds_embedding(module: nn.Module) -> bool:
    """Return whether a module is, or adapts, a table of embeddings, which takes ids instead of activations."""
    return any(isinstance(part, nn.Embedding) for part in module.modules())


def _arithmetic_of(module: Any, dtype: torch.dtype) -> Arithmetic:
    """Return how one linear module computes on random inputs of this dtype."""
    tensors = [*module.parameters(), *module.buffers()]
    width = families.linear_width_of(module)
    if not tensors or width is None:
        return Arithmetic(dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (_N_INPUTS, width)
    inputs, change = (torch.randn(shape, generator=generator).to(tensors[0].device) for _ in range(2))
    with torch.no_grad():
        output, changed = (
            module(tensor.to(dtype)[None]) for tensor in (inputs, inputs + _TINY * change * inputs.abs())
        )
    coarser = [half for half in _HALF if torch.equal(output.to(half).to(output.dtype), output)]
    computed_in = coarser[0] if coarser else dtype
    jump = float((output - changed).abs().max() / output.abs().max())
    return Arithmetic(computed_in, jump if jump > _JUMP and computed_in not in _HALF else 0.0)
