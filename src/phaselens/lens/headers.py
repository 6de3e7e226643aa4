"""Whether a checkpoint on the disk is whole, told from its headers: nothing is allocated and no weight is read."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from phaselens.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: One of them is in every checkpoint with a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
)
_AGAIN = "fetch or copy it again"


def require_whole(folder: Path, source: str, *, complete: bool = True) -> None:
    """Read the config, the shards' index and every safetensors header, and compare them with the files' sizes.

    Args:
        folder: of the checkpoint.
        source: what the user calls it.
        complete: whether a shard that is not there is an error (in the hub's cache it may still be fetched).

    Raises:
        ModelError: for what cannot be read, is truncated, or is not there.
    """
    _read_json(folder / "config.json", source)
    for file, tensors in _weight_files(folder, source).items():
        path = folder / file
        if not path.is_file():
            if complete:
                indexed = f"shard {file} is named in {_INDEX} and is not there"
                problem = indexed if tensors else f"{file} is no file, or a link that leads nowhere"
                raise ModelError(f"model {source!r}: {problem}; fetch or copy it too")
            continue
        header = read_header(path, source)
        _require_sound(path, source)
        missing = sorted(tensors - header.keys())
        if missing:
            raise ModelError(
                f"model {source!r}: {_INDEX} says that {missing[0]} is in {file}, which does not hold it; {_AGAIN}"
            )


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any file of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def require_tokenizer(folder: Path, source: str) -> None:
    """ModelError where the folder holds no tokenizer, or one whose JSON cannot be read."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"model {source!r} has no tokenizer for the texts: {folder} holds no tokenizer files; copy them there, or "
            "use phaselens.load(…, tokenizer=…)"
        )
    for name in _TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            _read_json(folder / name, source)


def _weight_files(folder: Path, source: str) -> dict[str, set[str]]:
    """The safetensors files that are loaded, each with the tensors that the index expects in it."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: set()}
    if not (folder / _INDEX).is_file():
        return {path.name: set() for path in sorted(folder.glob("*.safetensors"))}
    places = _read_json(folder / _INDEX, source).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(f"model {source!r}: {_INDEX} holds no weight_map from tensors to files; {_AGAIN}")
    files: dict[str, set[str]] = {}
    for tensor, file in places.items():
        files.setdefault(file, set()).add(tensor)
    return files


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{_unloadable(path, source)} cannot be read ({error.strerror}); {_AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{_unloadable(path, source)} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{_unloadable(path, source)} holds a JSON {type(content).__name__} and no object; {_AGAIN}"
        )
    return content


def read_header(path: Path, source: str) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: dtype, shape and data_offsets by name.

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
        raise ModelError(f"{_unloadable(path, source)} cannot be read: {error.strerror}") from error
    if not text:
        raise _damaged(path, source, f"it has {size:,} bytes, fewer than its header takes")
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, source, "its header cannot be read") from error
    if size != 8 + length + end:
        raise _damaged(path, source, f"it has {size:,} bytes where its header describes {8 + length + end:,}")
    return tensors


def _require_sound(path: Path, source: str) -> None:
    """ModelError where dtypes, shapes and offsets of the header do not fit each other; the library that loads the file
    compares them when it opens it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        problem = str(error).removeprefix("Error while deserializing header: ")
        raise _damaged(path, source, problem if len(problem) <= 100 else problem[:99] + "…") from error


def _unloadable(path: Path, source: str) -> str:
    return f"model {source!r} could not be loaded: {path.name}"


def _damaged(path: Path, source: str, problem: str) -> ModelError:
    return ModelError(
        f"model {source!r}: its safetensors file cannot be read ({path.name}: {problem}); it is truncated or "
        f"damaged, {_AGAIN}"
    )


def count_numbers(folder: Path, source: str) -> int | None:
    """How many numbers the folder's safetensors files hold, by their headers; None where there are none."""
    files = [folder / file for file in _weight_files(folder, source)]
    headers = [read_header(path, source) for path in files if path.is_file()]
    return sum(prod(entry.get("shape", ())) for header in headers for entry in header.values()) or None
