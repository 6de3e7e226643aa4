"""Errors while a checkpoint is read become one line about the model; refusals and interrupts stay what they are."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError

from phaselens.errors import InputError, ModelError, RefusedModel
from phaselens.lens.pretrained import as_model_errors


class UnknownTokenError(Exception):
    """An error of a library that no list of errors has."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("header too large"), "safetensors file cannot be read (header too large); it is truncated"),
        (MemoryError(), "not enough memory; use a smaller dtype (--dtype bf16)"),
        (torch.OutOfMemoryError("CUDA"), "not enough memory; use a smaller dtype (--dtype bf16)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory (DefaultCPUAllocator"),
        (RuntimeError("set ignore_mismatched_sizes\nsee the report above"), "other shapes than its config.json says"),
        (RuntimeError("broken\n  in two"), "could not be loaded: broken in two"),
        (OSError("no file"), "could not be loaded: no file"),
        (UnknownTokenError("id 7"), "could not be loaded: UnknownTokenError: id 7; check its config.json"),
        (ValueError("x" * 500), "x" * 197 + "…"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_an_error_of_loading_is_one_line_about_the_model(error: Exception, message: str) -> None:
    with pytest.raises(ModelError) as raised, as_model_errors("tiny"):
        raise error
    assert str(raised.value).startswith("model 'tiny'")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ModelError("a"), InputError("b"), RefusedModel("c"), KeyboardInterrupt()], ids=repr
)
def test_what_is_already_said_is_not_said_again(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, as_model_errors("tiny"):
        raise error
    assert raised.value is error
