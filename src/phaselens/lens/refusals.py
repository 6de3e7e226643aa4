"""Refusals with their true reason: the model's own forward, its memory, or a step of the lens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from phaselens.errors import ModelError, PhaseLensError, RefusedModel
from phaselens.lens.memory import is_out_of_memory
from phaselens.lens.pretrained import one_line
from phaselens.lens.reference import probe_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADVICE = "use a model type that docs/families.md lists as served"
"""What to do about a model that is refused."""

_ADVISES = r"\b(use|try|fetch)\b"


def family_of(model: PreTrainedModel) -> str:
    """Return the model's type and its class, for the beginning of a message."""
    return f"{model.config.model_type} ({type(model).__name__})"


@contextmanager
def refusing(model: PreTrainedModel, step: str, *, unwrapped: bool = False) -> Iterator[None]:
    """Turn what a model's code raises inside the context into a refusal.

    Args:
        step: what is done inside, as in "PhaseLens could not …".
        unwrapped: whether the model still is as transformers built it. Its own forward then shows whether it runs at
            all.

    Raises:
        RefusedModel: with the error, in place of it.
        ModelError: where memory ran out.
    """
    try:
        yield
    except RefusedModel as refusal:
        message = _completed(model, str(refusal))
        if message == str(refusal):
            raise
        raise RefusedModel(message) from refusal
    except PhaseLensError:
        raise
    except Exception as error:  # a model's code may raise anything
        family = family_of(model)
        if is_out_of_memory(error):
            raise ModelError(
                f"{family}: not enough memory ({one_line(error)}); use a smaller dtype (--dtype bf16)"
            ) from error
        own_error = _error_of_own_forward(model) if unwrapped else None
        if own_error is not None:
            raise RefusedModel(_own_failure(model, own_error)) from own_error
        although = ", although the model itself runs" if unwrapped else ""
        raise RefusedModel(
            f"{family}: PhaseLens could not {step}{although} ({_described(error)}); {ADVICE}, and please report this "
            "one with the output of --debug"
        ) from error


def _completed(model: PreTrainedModel, message: str) -> str:
    """Return a refusal with the family that it is about, and with what to do, where it lacks them."""
    if model.config.model_type not in message:
        message = f"{family_of(model)}: {message}"
    return message if re.search(_ADVISES, message) else f"{message}; {ADVICE}"


def _error_of_own_forward(model: PreTrainedModel) -> Exception | None:
    """Return what the model's own forward on text raises; None if it runs, or if there is no text for it."""
    try:
        tokens = probe_tokens(model)
    except Exception:  # noqa: BLE001 - its configuration may say anything
        return None
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        return error
    return None


def _own_failure(model: PreTrainedModel, error: Exception) -> str:
    # A model may keep a few weights in float32, and quantised ones as whole numbers.
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    dtype = sizes.most_common(1)[0][0]
    advice = ADVICE if dtype == torch.float32 else "try --dtype float32"
    return (
        f"{family_of(model)}: the model's own forward on text fails in {str(dtype).removeprefix('torch.')} "
        f"({_described(error)}); {advice}"
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
