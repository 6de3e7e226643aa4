"""Digests that tell whether two loads gave the same model: of a checkpoint's files, or of the weights themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from phaselens.lens.digests import sha256
from phaselens.lens.model_source import ModelSource

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".tiktoken")
#: Files of a tokenizer with another suffix.
_TOKENIZER_FILES = ("merges.txt", "vocab.txt")


def file_digests(source: ModelSource) -> dict[str, str] | None:
    """Return the sha256 of every weight file, config and tokenizer file of a model by name.

    None for a hub id that is not in the local cache yet.

    Raises:
        ModelError: for a path or package that is missing.
    """
    digests: dict[str, str] = {}
    if source.gguf is not None:
        digests = {source.gguf.name: sha256(source.gguf)}
    else:
        folder = source.folder if source.folder is not None else _cached_folder(source.base)
        if folder is None:
            return None
        digests = _folder_digests(folder)
    for adapter in (source.adapter, source.named_adapter):
        if adapter is not None:
            digests |= {f"adapter/{name}": digest for name, digest in _folder_digests(adapter).items()}
    return digests


def _cached_folder(source: ModelSource) -> Path | None:
    """Return the folder of a hub id's revision in the local cache."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(config).parent if isinstance(config, str) else None


def _folder_digests(folder: Path) -> dict[str, str]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in _SUFFIXES or file.name in _TOKENIZER_FILES)
    )
    return {file.name: sha256(file) for file in files}


def weights_digest(lens: HookedTransformer) -> str:
    """Return the sha256 of all weights of a loaded model, for one that was not loaded from files."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(lens.original_model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
