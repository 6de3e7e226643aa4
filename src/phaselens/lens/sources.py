"""Find and read a checkpoint: names, folders, hub ids; every way it can fail, as one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from phaselens.errors import InputError, ModelError, RefusedModel, close_matches
from phaselens.lens import headers, packaged
from phaselens.lens.digests import sha256

BUNDLED = ("rope", "drope")
# Every name that `load` takes without a folder or a hub.
NAMES = (*BUNDLED, *packaged.names())

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}

# Larger folders would take seconds to hash before anything is measured.
_HASH_UP_TO_BYTES = 1 << 30


_HUB_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Whether it could be a repository on the hub: `owner/name`, or a name alone, as the oldest models have it.

    >>> is_hub_id("gpt2"), is_hub_id("org/model-1.5"), is_hub_id("no model"), is_hub_id("a/b/c")
    (True, True, False, False)
    """
    parts = source.split("/")
    return len(parts) <= 2 and all(
        _HUB_NAME.fullmatch(part) and "--" not in part and ".." not in part for part in parts
    )


def resolve(source: str) -> str:
    """A bundled or packaged name as its folder, a folder as it is, anything else as a hub id. Asks nothing of the
    network.

    Raises:
        ModelError: for something that was meant as a folder and is not there, or is no hub id either.
    """
    if source in packaged.MODELS:
        return packaged.resolve(source)
    if source in BUNDLED:
        folder = resources.files("phaselens.data") / "models" / source
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model {source!r}: the bundled checkpoint is not in this installation; reinstall phaselens"
            )
        return str(folder)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model {source!r}: the folder holds no config.json; name a Hugging Face checkpoint folder"
            )
        return str(path)
    if path.is_file():
        raise ModelError(f"model {source!r} is a file; name the checkpoint's folder instead")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    if looks_like_path:
        raise ModelError(
            f"model {source!r}: no such folder; name a checkpoint folder, a hub id, or one of {', '.join(NAMES)}"
        )
    if not is_hub_id(source):
        raise ModelError(
            f"model {source!r}: neither one of {', '.join(NAMES)}, nor a folder, nor a hub id like "
            f"owner/name or gpt2; {close_matches(source, NAMES)}"
        )
    return source


def resolve_device(name: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        InputError: for a name torch does not know, or a device that is not here.
    """
    if not isinstance(name, str | torch.device):
        raise InputError(f"device is of type {type(name).__name__}; use auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as unknown:
        raise InputError(
            f"device {name!r} is not one torch knows; use auto, cpu, cuda or cuda:N"
        ) from unknown
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"device {name!r}: the statistics are checked on cpu and cuda only; use one of these"
        )
    return device


def resolve_dtype(name: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    """`auto` is the checkpoint's own dtype on a GPU, and float32 on a CPU.

    Raises:
        InputError: for a name that is not a floating dtype served here.
    """
    if isinstance(name, torch.dtype):
        if name not in DTYPES.values():
            raise InputError(f"dtype {name}: use one of {', '.join(DTYPES)}")
        return name
    if not isinstance(name, str):
        raise InputError(f"dtype is of type {type(name).__name__}; use auto or one of {', '.join(DTYPES)}")
    if name == "auto":
        own = getattr(config, "dtype", None)
        if device.type == "cpu" or not isinstance(own, torch.dtype) or own not in DTYPES.values():
            return torch.float32
        return own
    if name.removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; {close_matches(name, ['auto', *DTYPES])}")
    return DTYPES[name.removeprefix("torch.")]


def require_reachable(source: str, revision: str | None) -> None:
    """For a hub id that is not in the local cache: find out in seconds whether the hub can be reached.

    The hub's client would retry for most of a minute before it says so.
    """
    if Path(source).is_dir():
        return
    import huggingface_hub
    from huggingface_hub import constants, errors

    if isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json", revision=revision), str):
        return
    missing = f"model {source!r} is not in the local cache"
    if "/" not in source:
        missing = f"model {source!r}: neither one of {', '.join(NAMES)}, nor a folder, nor a hub id in the local cache"
    near = difflib.get_close_matches(source, NAMES, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    if constants.is_offline_mode():
        raise ModelError(
            f"{missing}, and HF_HUB_OFFLINE is set; unset it to fetch the model, or name a folder{hint}"
        )
    url = huggingface_hub.hf_hub_url(source, "config.json", revision=revision)
    client_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=5)
    except errors.HfHubHTTPError as refused:
        raise ModelError(f"{missing}, and the hub does not give it: {_line(refused)}{hint}") from refused
    except client_error as unreachable:
        raise ModelError(
            f"{missing}, and the hub at {constants.ENDPOINT} cannot be reached; check the name and the network, or "
            f"name a checkpoint folder{hint}"
        ) from unreachable


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn whatever loading raises into one line about `source`."""
    from safetensors import SafetensorError

    try:
        yield
    except (ModelError, InputError):
        raise
    except SafetensorError as broken:
        raise ModelError(
            f"model {source!r}: its safetensors file cannot be read ({_line(broken)}); it is truncated or damaged, "
            "fetch or copy it again"
        ) from broken
    except (MemoryError, torch.OutOfMemoryError) as short:
        raise ModelError(
            f"model {source!r}: not enough memory; use a smaller dtype (--dtype bf16)"
        ) from short
    except RuntimeError as wrong:
        if "ignore_mismatched_sizes" in str(wrong):
            raise ModelError(
                f"model {source!r} could not be loaded: its weights have other shapes than its config.json says; take "
                "both from one checkpoint"
            ) from wrong
        if "memory" in str(wrong).lower():
            raise ModelError(f"model {source!r}: not enough memory ({_line(wrong)})") from wrong
        raise ModelError(f"model {source!r} could not be loaded: {_line(wrong)}") from wrong
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as wrong:
        raise ModelError(f"model {source!r} could not be loaded: {_line(wrong)}") from wrong
    except Exception as wrong:
        # Strict config classes raise types of their own, which are not public.
        if type(wrong).__module__.startswith(("huggingface_hub", "transformers")):
            raise ModelError(f"model {source!r} could not be loaded: {_line(wrong)}") from wrong
        raise


def _line(error: BaseException) -> str:
    """The first sentence or so of an error, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "…"


def require_weights(folder: str, source: str, allow_pickle: bool) -> None:
    """Check that a local folder has weights that can be read, before anything heavy is imported or allocated."""
    path = Path(folder)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        if allow_pickle:
            return
        raise ModelError(
            f"model {source!r} holds its weights as pickle, which can run code when it is read; convert it to "
            "safetensors, or allow it by name: load(..., allow_pickle=True)"
        )
    raise ModelError(
        f"model {source!r}: a config.json, but no *.safetensors beside it; copy the weights there too"
    )


def require_readable(folder: str, source: str, revision: str | None, allow_pickle: bool = False) -> None:
    """Find out, by headers alone, what would stop the loading: weights that are missing, truncated or damaged, a hub
    that cannot be reached.

    Args:
        folder: what `resolve` gave for `source`: a folder or a hub id.

    Raises:
        ModelError: with what is wrong.
    """
    path = Path(folder)
    if path.is_dir():
        require_weights(folder, source, allow_pickle)
        headers.require_whole(path, source)
        return
    require_reachable(folder, revision)
    import huggingface_hub
    from huggingface_hub import constants

    config = huggingface_hub.try_to_load_from_cache(folder, "config.json", revision=revision)
    if isinstance(config, str):
        offline = constants.is_offline_mode()
        if offline:
            require_weights(str(Path(config).parent), source, allow_pickle)
        headers.require_whole(Path(config).parent, source, complete=offline)


def require_complete(folder: str, source: str) -> None:
    """Find out what else would stop a run on a checkpoint folder: a config that transformers does not know, a
    tokenizer that is not there. For a hub id nothing is asked.

    Raises:
        ModelError: with what is wrong.
    """
    path = Path(folder)
    if not path.is_dir():
        return
    headers.require_tokenizer(path, source)
    with explained(source):
        from transformers import AutoConfig

        AutoConfig.from_pretrained(folder, trust_remote_code=False)


def require_memory(
    folder: str, source: str, dtype: torch.dtype, device: torch.device, loaded_as: torch.dtype | None = None
) -> None:
    """Refuse a checkpoint that cannot fit, reading only its headers.

    Args:
        dtype: what the model is to be in.
        loaded_as: what it is in until then, where that is another dtype.

    Raises:
        ModelError: with what is needed and what is free.
    """
    path = Path(folder)
    numbers = headers.count_numbers(path, source) if path.is_dir() else None
    if numbers is None:
        return
    widest = max(dtype, loaded_as or dtype, key=lambda each: each.itemsize)
    need = numbers * widest.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if need > free:
        smaller = "" if widest == loaded_as else "a smaller dtype (--dtype bf16) or "
        raise ModelError(
            f"model {source!r} needs {need / 1e9:.1f} GB as {str(widest).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free on {device.type}; use {smaller}a machine with more memory"
        )


def hash_files(folder: str) -> dict[str, str]:
    """sha256 of a local checkpoint's files by name; empty for hub ids and for folders over 1 GiB."""
    path = Path(folder)
    if not path.is_dir():
        return {}
    files = sorted(
        f for f in path.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors", ".bin", ".model")
    )
    if sum(f.stat().st_size for f in files) > _HASH_UP_TO_BYTES:
        return {}
    return {file.name: sha256(file) for file in files}


def load_tokenizer(source: str, tokenizer: Any, revision: str | None) -> tuple[Any, str | None]:
    """The tokenizer, or None and why there is none.

    Args:
        tokenizer: a tokenizer object, or where to load one from, or None: the checkpoint's own.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer, None
    from transformers import AutoTokenizer

    where = tokenizer or source
    if tokenizer is None and Path(source).is_dir() and not headers.has_tokenizer(Path(source)):
        return None, f"{source} holds no tokenizer files; name one with tokenizer=…"
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False), None
    except (OSError, ValueError, KeyError, ImportError) as wrong:
        if tokenizer is not None:
            raise ModelError(f"tokenizer {where!r} could not be loaded: {_line(wrong)}") from wrong
        return None, f"no tokenizer could be loaded from {where}: {_line(wrong)}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off the terminal; what matters of them is raised."""
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


def load_pretrained(
    folder: str,
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Any:
    """The model, every weight of it from the checkpoint.

    Raises:
        RefusedModel: where the checkpoint leaves weights out, which transformers would fill at random.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    missing = sorted(told["missing_keys"])
    if missing:
        raise RefusedModel(
            f"model {source!r}: its checkpoint lacks {len(missing)} of the model's tensors (first: {missing[0]}), "
            "which would be filled at random; fetch the whole checkpoint, or check model_type in config.json"
        )
    return model.to(device)
