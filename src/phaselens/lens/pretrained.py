"""Contexts for calls of transformers that read a checkpoint: one-line errors, no output, no fetched kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from phaselens.errors import InputError, ModelError, PhaseLensError
from phaselens.lens.memory import is_out_of_memory


@contextmanager
def as_model_errors(name: str) -> Iterator[None]:
    """Turn every error of loading into a ModelError of one line about the model of that name."""
    from safetensors import SafetensorError

    try:
        yield
    except (ModelError, InputError):
        raise
    except SafetensorError as error:
        raise ModelError(
            f"model {name!r}: its safetensors file cannot be read ({one_line(error)}); it is truncated or damaged, "
            "fetch or copy it again"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(f"model {name!r}: not enough memory; use a smaller dtype (--dtype bf16)") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"model {name!r} could not be loaded: its weights have other shapes than its config.json says; take "
                "both from one checkpoint"
            ) from error
        if is_out_of_memory(error):
            raise ModelError(f"model {name!r}: not enough memory ({one_line(error)})") from error
        raise ModelError(f"model {name!r} could not be loaded: {one_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"model {name!r} could not be loaded: {one_line(error)}") from error
    except PhaseLensError:
        raise
    except Exception as error:  # a config with impossible values raises whatever they lead to
        raise ModelError(
            f"model {name!r} could not be loaded: {type(error).__name__}: {one_line(error)}; check its config.json"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the first 200 characters of an error, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "…"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off the terminal; problems that matter raise errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_compilers() -> Iterator[None]:
    """Keep models of transformers from compiling kernels of their own, which starts ninja; they have another path."""
    import sys

    replaced = []
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.startswith("transformers") and "is_ninja_available" in vars(module):
            replaced.append((vars(module), vars(module)["is_ninja_available"]))
    try:
        for attributes, _ in replaced:
            attributes["is_ninja_available"] = _is_not_available
        yield
    finally:
        for attributes, is_available in replaced:
            attributes["is_ninja_available"] = is_available


def _is_not_available() -> bool:
    return False


@contextmanager
def without_fetched_kernels() -> Iterator[None]:
    """Keep transformers from fetching compiled kernels for a GGUF model over the network, where that is installed."""
    try:
        kernels = import_module("transformers.integrations.gguf.kernels")
    except ImportError:
        yield
        return
    is_available = kernels.is_kernels_available
    vars(kernels)["is_kernels_available"] = lambda: False
    try:
        yield
    finally:
        vars(kernels)["is_kernels_available"] = is_available
