"""Checks that a checkpoint on the disk is intact, by its headers alone: no weight is read, nothing is allocated."""

from __future__ import annotations

import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

from phaselens.errors import ModelError
from phaselens.lens.declared_sizes import require_sizes, require_token_ids
from phaselens.lens.declared_values import require_values

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
# The field of a config that names the file with the weights.
CHOICE = "transformers_weights"
#: Every checkpoint with a tokenizer has one of them.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
)
#: Files of a checkpoint that are read or hashed.
_READ_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf")
_COPY_AGAIN = "fetch or copy it again"


def require_intact(folder: Path, model_name: str, *, complete: bool = True) -> None:
    """Read the config, the shards' index and every safetensors header, and compare them with the files' sizes.

    Args:
        folder: the checkpoint.
        model_name: its name in messages.
        complete: whether a missing shard is an error (in the hub's cache it may still be fetched).

    Raises:
        ModelError: for a file that cannot be read, is truncated, or is missing, and for values in the config that no
            model can have.
    """
    config = _read_json(folder / _CONFIG, model_name)
    require_values(config, model_name)
    n_tensors, n_numbers, is_whole = 0, 0, True
    for file, tensors in _weight_files(folder, model_name).items():
        path = folder / file
        if not path.is_file():
            if complete:
                indexed = f"shard {file} is named in {INDEX} and is missing"
                problem = indexed if tensors else f"{file} is not a file, or a link to a missing one"
                raise ModelError(f"model {model_name!r}: {problem}; fetch or copy it too")
            is_whole = False
            continue
        header = read_header(path, model_name)
        _require_valid_header(path, model_name)
        n_tensors += len(header)
        n_numbers += sum(prod(entry.get("shape", ())) for entry in header.values())
        missing = sorted(tensors - header.keys())
        if missing:
            raise ModelError(
                f"model {model_name!r}: {INDEX} says that {missing[0]} is in {file}, which does not hold it; "
                f"{_COPY_AGAIN}"
            )
    if is_whole and n_tensors:
        require_sizes(config, n_tensors, n_numbers, model_name)


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has any file of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def require_tokenizer(folder: Path, model_name: str) -> None:
    """Raise ModelError where the folder has no tokenizer, or one whose JSON cannot be read."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"model {model_name!r} has no tokenizer for the texts: {folder} holds no tokenizer files; copy them there, "
            "or use phaselens.load(…, tokenizer=…)"
        )
    for name in _TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            _read_json(folder / name, model_name)
    require_token_ids(folder, model_name)


def require_inside(name: str, model_name: str, named_in: str) -> None:
    """Check the name of a file with weights that a checkpoint's own files state.

    Raises:
        ModelError: for a name that leads out of the checkpoint's folder, and for a file of another format, such as
            pickle.
    """
    if re.search(r"[/\\:]", name) or name.startswith("."):
        raise ModelError(
            f"model {model_name!r}: {named_in} names weights outside of the checkpoint's folder ({name!r}); they are "
            "not read"
        )
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"model {model_name!r}: {named_in} names weights that are not safetensors ({name!r}); pickle can run code "
            "when it is read, so convert them to safetensors"
        )


def require_own_files(folder: Path, model_name: str) -> None:
    """Check that what is read of a checkpoint are regular files in its folder, or in the hub cache's own store.

    Raises:
        ModelError: for a link that leads elsewhere, and for a pipe, socket or device.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ_SUFFIXES or path.is_dir() or not path.exists():
            continue
        if not path.is_file():
            raise ModelError(f"{_unloadable(path, model_name)} is not a regular file; it is not read")
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise ModelError(
                f"{_unloadable(path, model_name)} is a link out of the checkpoint's folder; copy the file there"
            )


def _weight_files(folder: Path, model_name: str) -> dict[str, set[str]]:
    """Return the safetensors files to load, each with the tensors that the index expects in it."""
    chosen = _read_json(folder / _CONFIG, model_name).get(CHOICE) if (folder / _CONFIG).is_file() else None
    if chosen is not None:
        require_inside(str(chosen), model_name, f"{CHOICE} in {_CONFIG}")
        if not str(chosen).endswith(".json"):
            return {str(chosen): set()}
    elif (folder / _SINGLE).is_file():
        return {_SINGLE: set()}
    index = INDEX if chosen is None else str(chosen)
    if not (folder / index).is_file():
        return {path.name: set() for path in sorted(folder.glob("*.safetensors"))}
    return shards_in(_read_json(folder / index, model_name), model_name, index)


def shards_in(index: dict[str, Any], model_name: str, index_name: str = INDEX) -> dict[str, set[str]]:
    """Return the files that an index of shards names, each with its tensors.

    Raises:
        ModelError: for an index without files, and for files that are not safetensors in the checkpoint's folder.
    """
    file_by_tensor = index.get("weight_map")
    if not isinstance(file_by_tensor, dict) or not all(
        isinstance(file, str) for file in file_by_tensor.values()
    ):
        raise ModelError(
            f"model {model_name!r}: {index_name} holds no weight_map from tensors to files; {_COPY_AGAIN}"
        )
    files: dict[str, set[str]] = {}
    for tensor, file in file_by_tensor.items():
        require_inside(file, model_name, index_name)
        if not file.endswith(".safetensors"):
            raise ModelError(f"model {model_name!r}: {index_name} names {file!r} as a file with weights")
        files.setdefault(file, set()).add(tensor)
    return files


def _read_json(path: Path, model_name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{_unloadable(path, model_name)} cannot be read ({error.strerror}); {_COPY_AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{_unloadable(path, model_name)} is not valid JSON ({error}); {_COPY_AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{_unloadable(path, model_name)} holds a JSON {type(content).__name__} instead of an object; {_COPY_AGAIN}"
        )
    return content


def read_header(path: Path, model_name: str) -> dict[str, dict[str, Any]]:
    """Return the tensors of a safetensors file: dtype, shape and data_offsets by name.

    Raises:
        ModelError: where the file is not as long as its header says, or the header cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            head = handle.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            text = handle.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise ModelError(f"{_unloadable(path, model_name)} cannot be read: {error.strerror}") from error
    if not text:
        raise _damaged(path, model_name, f"it has {size:,} bytes, too few for its header")
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, model_name, "its header cannot be read") from error
    if size != 8 + length + end:
        raise _damaged(path, model_name, f"it has {size:,} bytes; its header describes {8 + length + end:,}")
    return tensors


def _require_valid_header(path: Path, model_name: str) -> None:
    """Raise ModelError if dtypes, shapes and offsets in the header are inconsistent, by safetensors' own check."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        problem = str(error).removeprefix("Error while deserializing header: ")
        raise _damaged(path, model_name, problem if len(problem) <= 100 else problem[:99] + "…") from error


def _unloadable(path: Path, model_name: str) -> str:
    return f"model {model_name!r} could not be loaded: {path.name}"


def _damaged(path: Path, model_name: str, problem: str) -> ModelError:
    return ModelError(
        f"model {model_name!r}: its safetensors file cannot be read ({path.name}: {problem}); it is truncated or "
        f"damaged, {_COPY_AGAIN}"
    )


def count_bytes(folder: Path, model_name: str) -> int | None:
    """Return the size of the folder's safetensors files; None without such files."""
    paths = [folder / file for file in _weight_files(folder, model_name)]
    return sum(path.stat().st_size for path in paths if path.is_file()) or None


def count_numbers(folder: Path, model_name: str) -> int | None:
    """Return the number of values in the folder's safetensors files, by their headers; None without such files."""
    files = [folder / file for file in _weight_files(folder, model_name)]
    headers = [read_header(path, model_name) for path in files if path.is_file()]
    return sum(prod(entry.get("shape", ())) for header in headers for entry in header.values()) or None
