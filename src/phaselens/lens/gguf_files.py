"""Models in one GGUF file: its header checked through the package gguf, its weights dequantised by transformers."""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaselens.errors import ModelError
from phaselens.lens.pretrained import one_line, quiet_transformers, without_fetched_kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'phaselens[gguf]'"
# Divisors of the rotary frequencies, which transformers does not read.
_ROPE_DIVISORS = "rope_freqs.weight"
# Divisors for short and for long texts, which no plain rotation represents.
_TWO_SET_DIVISORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_N_SHARDS = "split.count"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file's header states.

    Attributes:
        n_numbers: the number of values in all tensors.
        storage: the types of its matrices, the most common first: ``Q4_K, Q6_K``.
        problem: why its model cannot be served exactly; None if it can.
        divides_frequencies: whether it stores divisors of the rotary frequencies.
    """

    n_numbers: int
    storage: str
    problem: str | None
    divides_frequencies: bool

    @property
    def quantisation(self) -> str:
        """The description of the weights in a model's facts."""
        return f"GGUF {self.storage}, dequantised"


def read_header(path: Path, model_name: str) -> GgufHeader:
    """Return what the header of a GGUF file states; an unchanged file is read once.

    Raises:
        ModelError: where the package gguf is missing, and for a file that is not GGUF, truncated or damaged.
    """
    if find_spec("gguf") is None:
        raise ModelError(
            f"model {model_name!r}: the package gguf, which reads it, is not installed; {INSTALL}"
        )
    status = path.stat()
    try:
        return _header(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"model {model_name!r}: its GGUF file cannot be read ({one_line(error)}); it is truncated or damaged, "
            "fetch or copy it again"
        ) from error


def require_served(path: Path, model_name: str) -> None:
    """Check by its header alone that a GGUF file can be loaded exactly.

    Raises:
        ModelError: for a file that cannot be read, a part of a model, and a rotation that transformers would change.
    """
    problem = read_header(path, model_name).problem
    if problem is not None:
        raise ModelError(f"model {model_name!r}: {problem}")


@lru_cache(maxsize=16)
def _header(path: Path, *_state: int) -> GgufHeader:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        # A matrix; norms and biases are stored in full.
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += prod(int(length) for length in tensor.shape)
    n_numbers = sum(prod(int(length) for length in tensor.shape) for tensor in reader.tensors)
    types = [name for name, _ in sizes.most_common()]
    is_divided = any(tensor.name == _ROPE_DIVISORS for tensor in reader.tensors)
    return GgufHeader(n_numbers, ", ".join(types), _problem(reader), is_divided)


def _problem(reader: Any) -> str | None:
    """Return why the model of this file cannot be loaded exactly, and what to do; None if it can."""
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")
    }
    names = {tensor.name for tensor in reader.tensors}
    if int(fields.get(_N_SHARDS, 1)) > 1:
        return (
            "the file is one part of a model in several GGUF files, which transformers does not read; join them with "
            "llama-gguf-split --merge"
        )
    architecture = fields["general.architecture"]
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    is_scaled = scaling != "none" and float(fields.get(f"{architecture}.rope.scaling.factor", 0.0)) != 1.0
    if is_scaled or names.intersection(_TWO_SET_DIVISORS):
        kind = f"{scaling} scaling" if is_scaled else "frequencies for short and for long texts"
        return (
            f"its rotation has {kind}, which transformers does not read from GGUF files; use the checkpoint in "
            "safetensors"
        )
    return None


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a folder that holds nothing but a link to the file, and the link's path.

    transformers would also read what lies beside the file: a tokenizer's config, an adapter, and a file of the same
    name in the current folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, path.name)
        os.symlink(path.absolute(), link)
        yield folder, str(link)


def read_config(path: Path) -> Any:
    """Return the configuration that the file describes; raises what transformers raises."""
    from transformers import AutoConfig

    with _alone(path) as (folder, file), quiet_transformers():
        return AutoConfig.from_pretrained(folder, gguf_file=file)


def load(path: Path, dtype: torch.dtype, config: Any = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the dequantised model on the CPU, and transformers' report on its loading; raises what that raises.

    Args:
        config: the result of `read_config`, where that is known already: transformers takes seconds to read it.
    """
    import transformers

    from phaselens.lens import families

    # Versions that do not know GgufConfig always dequantise.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}

    # transformers draws its progress bar for GGUF files on stderr at every verbosity.
    quiet = redirect_stderr(io.StringIO())
    with _alone(path) as (folder, file), quiet_transformers(), quiet, without_fetched_kernels():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    # The weights are plain by now, although the configuration still calls them quantised.
    families.drop_quantisation(model)
    if read_header(path, path.name).divides_frequencies:
        _divide_frequencies(model, _rope_divisors(path))
    model.config.name_or_path = str(path)
    return model, report


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the file; raises what transformers raises."""
    from transformers import AutoTokenizer

    with _alone(path) as (folder, file), quiet_transformers(), redirect_stderr(io.StringIO()):
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _rope_divisors(path: Path) -> Tensor:
    """Return the divisors of the rotary frequencies [d_rotary / 2] that the file stores."""
    import torch
    from gguf import GGUFReader, dequantize

    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == _ROPE_DIVISORS)
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten()


def _divide_frequencies(model: PreTrainedModel, divisors: Tensor) -> None:
    """Divide the frequencies of every rotary module, as llama.cpp does; this is how Llama 3.1 extends its texts."""
    from phaselens.lens import families

    for rotary in families.rotary_modules(model):
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(rotary, name, None)
            if frequencies is None or frequencies.shape != divisors.shape:
                raise ValueError(
                    f"{_ROPE_DIVISORS} does not fit the model's rotation; use the checkpoint in safetensors"
                )
            setattr(rotary, name, frequencies / divisors.to(frequencies))
