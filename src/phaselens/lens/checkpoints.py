"""Reading a checkpoint: device, dtype, weights and tokenizer; every failure is an error of one line."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from phaselens.errors import InputError, ModelError, RefusedModel, close_matches, short_form
from phaselens.lens import gguf_files, headers, quantised, text_towers, weight_adapters
from phaselens.lens.config_errors import explaining_config, require_shapes
from phaselens.lens.model_source import NAMES, ModelSource
from phaselens.lens.pretrained import as_model_errors, one_line, quiet_transformers, without_compilers

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


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; `auto` is the GPU if there is one.

    Raises:
        InputError: for a name that torch does not know, or a device that this machine does not have.
    """
    if not isinstance(name, str | torch.device):
        raise InputError(f"device is {short_form(name)}; give auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"torch has no device {name!r}; use auto, cpu, cuda or cuda:N") from error
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


def resolve_dtype(name: str | torch.dtype, device: torch.device, config: object) -> torch.dtype:
    """Return the dtype of that name; `auto` is the checkpoint's on a GPU, and float32 on a CPU.

    Raises:
        InputError: for a name that is not one of `DTYPES`.
    """
    if isinstance(name, torch.dtype):
        if name not in DTYPES.values():
            raise InputError(f"dtype {name}: use one of {', '.join(DTYPES)}")
        return name
    if not isinstance(name, str):
        raise InputError(f"dtype is {short_form(name)}; give auto or one of {', '.join(DTYPES)}")
    if name == "auto":
        checkpoint_dtype = getattr(config, "dtype", None)
        if checkpoint_dtype is None and hasattr(config, "get_text_config"):
            checkpoint_dtype = config.get_text_config(decoder=True).dtype
        if (
            device.type == "cpu"
            or not isinstance(checkpoint_dtype, torch.dtype)
            or checkpoint_dtype not in DTYPES.values()
        ):
            return torch.float32
        return checkpoint_dtype
    if name.removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; {close_matches(name, ['auto', *DTYPES])}")
    return DTYPES[name.removeprefix("torch.")]


def _require_reachable(source: ModelSource) -> None:
    """Raise ModelError for a hub id, not in the local cache, while the hub cannot be reached or does not provide it.

    This takes seconds; the hub's client would retry for most of a minute.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    name, revision = source.location, source.revision
    missing = f"model {name!r} is not in the local cache"
    if "/" not in name:
        missing = f"model {name!r}: neither one of {', '.join(NAMES)}, nor a folder, nor a hub id in the local cache"
    close_names = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
    hint = f"; did you mean {close_names[0]}?" if close_names else ""
    if constants.is_offline_mode():
        raise ModelError(
            f"{missing}, and HF_HUB_OFFLINE is set; unset it to fetch the model, or name a folder{hint}"
        )
    url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision)
    client_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=5)
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{missing}, and the hub does not provide it: {one_line(error)}{hint}") from error
    except client_error as error:
        raise ModelError(
            f"{missing}, and the hub at {constants.ENDPOINT} cannot be reached; check the name and the network, or "
            f"name a checkpoint folder{hint}"
        ) from error


def _require_weights(folder: Path, name: str, allow_pickle: bool) -> None:
    """Raise ModelError for a folder without readable weights, before anything heavy is imported or allocated."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        if allow_pickle:
            return
        raise ModelError(
            f"model {name!r} holds its weights as pickle, which can run code when it is read; convert it to "
            "safetensors, or allow pickles: load(…, allow_pickle=True)"
        )
    raise ModelError(
        f"model {name!r}: the folder has a config.json, but no *.safetensors; copy the weights there too"
    )


def require_readable(source: ModelSource, allow_pickle: bool = False) -> None:
    """Check, by headers alone, that a checkpoint and its adapter can be loaded.

    Raises:
        ModelError: for weights that are missing, truncated, damaged or outside of the folder, for a missing package,
            and for a hub that cannot be reached.
    """
    if source.named_adapter is not None:
        weight_adapters.require_readable(source.named_adapter, source.name)
    if source.gguf is not None:
        if not source.gguf.is_file():
            raise ModelError(f"model {source.name!r} is not a regular file; it is not read")
        gguf_files.require_served(source.gguf, source.name)
        return
    if source.folder is not None:
        headers.require_own_files(source.folder, source.name)
        _require_weights(source.folder, source.name, allow_pickle)
        headers.require_intact(source.folder, source.name)
        return
    import huggingface_hub
    from huggingface_hub import constants

    config = huggingface_hub.try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    if not isinstance(config, str):
        _require_reachable(source)
        return
    offline = constants.is_offline_mode()
    headers.require_own_files(Path(config).parent, source.name)
    if offline:
        _require_weights(Path(config).parent, source.name, allow_pickle)
    headers.require_intact(Path(config).parent, source.name, complete=offline)


def require_complete(source: ModelSource) -> None:
    """Check the config and the tokenizer that a run on a folder or file needs; does nothing for a hub id.

    Raises:
        ModelError: for a config that transformers does not know, and for a missing tokenizer or package.
    """
    if source.base.kind == "other":
        return
    if source.folder is not None:
        headers.require_tokenizer(source.folder, source.name)
    with as_model_errors(source.name):
        quantised.require_package(read_config(source), source.name)


def read_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a checkpoint; raises what transformers raises.

    Implementations of attention and of experts that it names are left out: they may be code on the hub.
    """
    from transformers import AutoConfig

    if source.gguf is not None:
        return gguf_files.read_config(source.gguf)
    with explaining_config(source):
        config = AutoConfig.from_pretrained(
            source.location, revision=source.base.revision, trust_remote_code=trust_remote_code
        )
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, None)
    return config


def require_memory(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    loaded_as: torch.dtype | None = None,
    *,
    as_stored: bool = False,
) -> None:
    """Check, by headers alone, that a checkpoint folder or file fits into memory.

    Args:
        dtype: the model's dtype.
        loaded_as: the dtype before a cast, where that is another one.
        as_stored: whether the weights stay as they are stored: quantised.

    Raises:
        ModelError: with the bytes needed and the bytes free.
    """
    n_numbers: int | None = None
    if source.gguf is not None:
        n_numbers = gguf_files.read_header(source.gguf, source.name).n_numbers
    elif source.folder is not None:
        n_numbers = headers.count_numbers(source.folder, source.name)
    if n_numbers is None:
        return
    widest = max(dtype, loaded_as or dtype, key=lambda candidate: candidate.itemsize)
    need = n_numbers * widest.itemsize
    if as_stored and source.folder is not None:
        need = headers.count_bytes(source.folder, source.name) or 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if need > free:
        smaller = "" if as_stored or widest == loaded_as else "a smaller dtype (--dtype bf16) or "
        kind = "stored" if as_stored else str(widest).removeprefix("torch.")
        raise ModelError(
            f"model {source.name!r} needs {need / 1e9:.1f} GB as {kind}, and {free / 1e9:.1f} GB are free on "
            f"{device.type}; use {smaller}a machine with more memory"
        )


def load_pretrained(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    config: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    placement: dict[str, Any] | None = None,
) -> Any:
    """Load the text model, with every weight from the checkpoint, and without the adapter of its source.

    Args:
        config: its configuration, where that is known already.
        placement: arguments of `from_pretrained` that say where modules go, instead of `device`.

    Raises:
        ModelError: for a checkpoint whose package is not installed.
        RefusedModel: for a checkpoint that lacks weights, which transformers would fill at random.
    """
    if source.gguf is not None:
        model, loading_info = gguf_files.load(source.gguf, dtype, config)
        is_on_device = False
    else:
        config = config if config is not None else read_config(source, trust_remote_code)
        quantised.require_package(config, source.name)
        if placement is None:
            placement = quantised.placement(config, device)
        is_on_device = placement is not None
        model, loading_info = _load_safetensors(
            source,
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            **(placement or {}),
        )
    require_shapes(loading_info.get("mismatched_keys", ()), source.name)
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise RefusedModel(
            f"model {source.name!r}: its checkpoint lacks {len(missing)} of the model's tensors (first: {missing[0]}), "
            "which would be filled at random; fetch the whole checkpoint, or check model_type in config.json"
        )
    unexpected = sorted(loading_info["unexpected_keys"])
    if unexpected:
        raise RefusedModel(
            f"model {source.name!r}: its checkpoint holds {len(unexpected)} tensors that the model does not use "
            f"(first: {unexpected[0]}), so that another model would be measured; check model_type, "
            "num_hidden_layers and the biases in config.json"
        )
    # transformers refuses to move some quantised models, which are on the device already.
    return model if is_on_device else model.to(device)


def _require_safe_shards(source: ModelSource) -> None:
    """Fetch the index of a hub model's shards, if it has one, and check the names in it before any shard is read."""
    from transformers.utils import cached_file

    index = cached_file(
        source.location,
        headers.INDEX,
        revision=source.base.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is not None:
        headers.shards_in(json.loads(Path(index).read_text(encoding="utf-8")), source.name)


def _load_safetensors(source: ModelSource, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    if source.folder is None:
        _require_safe_shards(source)
        chosen = getattr(config, headers.CHOICE, None)
        if chosen is not None:
            headers.require_inside(str(chosen), source.name, f"{headers.CHOICE} in config.json")
    # Tensors of other shapes are then in the report, each with both shapes.
    options |= {"config": config, "revision": source.base.revision, "ignore_mismatched_sizes": True}
    whole_class = text_towers.whole_class(config)
    if whole_class is not None:
        with explaining_config(source):
            return text_towers.load(whole_class, source.location, **options)
    causal_class = _causal_class(source, config)
    with explaining_config(source), quiet_transformers(), without_compilers():
        model, loading_info = causal_class.from_pretrained(
            source.location, output_loading_info=True, **options
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {source.name!r} holds a model and an adapter, which transformers would apply unseen; download it, "
            "and name the two apart: BASE+ADAPTER"
        )
    return model, loading_info


def _causal_class(source: ModelSource, config: Any) -> Any:
    """Return the class of transformers that loads a checkpoint of text.

    The table of causal language models lists some text models only with the configuration of a whole that contains
    them (`mllama`); the checkpoint of such a text model alone names its class itself.
    """
    import transformers

    table = transformers.AutoModelForCausalLM
    if type(config) in table._model_mapping or hasattr(config, "auto_map"):
        return table
    architectures = list(config.architectures or ())
    for name in architectures:
        named: Any = getattr(transformers, name, None)
        is_generative = isinstance(named, type) and issubclass(named, transformers.GenerationMixin)
        if is_generative and named.config_class is type(config):
            return named
    raise RefusedModel(
        f"model {source.name!r}: transformers {transformers.__version__} has no causal language model of type "
        f"{config.model_type!r} (the checkpoint's class is {' or '.join(architectures) or 'not named'}); use a "
        "checkpoint of a causal language model"
    )
