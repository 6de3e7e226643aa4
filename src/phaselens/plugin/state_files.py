"""Files of states: one safetensors file per state, with a checksum. Never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phaselens.data.new_files import write_new
from phaselens.errors import InputError, require_flag, require_kind, short_form
from phaselens.plugin.state_codec import DamagedState, EncodedState, decode_state, encode_state
from phaselens.plugin.states import NestedState, plain_copy

STATE_SCHEMA = "phaselens.state/1"
#: Name of the tensor that holds the state's text: a header of safetensors may have 100 MB only.
_TEXT = "tree"
#: Name of the header's entry with the schema, the checksum and the caller's metadata.
_HEADER = "phaselens"


def write_state(
    path: str | os.PathLike[str],
    tree: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Write a state to a file, which appears complete or not at all. A file that exists is left as it is.

    Args:
        path: the file.
        tree: the state, as `Metric.state` returns it.
        metadata: texts for the file's header.
        replace: replace a file that exists.

    Raises:
        TypeError: for a value that a state cannot hold; names it.
        OSError: for a file that cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save

    file = _file(path)
    require_kind("tree", tree, Mapping, "as Metric.state returns it")
    if metadata is not None:
        require_kind("metadata", metadata, Mapping, "from names to texts")
    require_flag("replace", replace)
    encoded = encode_state(plain_copy(NestedState(tree), "state"))
    text = np.frombuffer(encoded.text.encode(), dtype=np.uint8)
    header = {**(metadata or {}), "schema": STATE_SCHEMA, "sha256": encoded.digest}
    # One entry, because safetensors writes several in an order that changes from one process to the next.
    entries = {_HEADER: json.dumps(header, sort_keys=True)}
    write_new(file, save({_TEXT: text, **encoded.arrays}, metadata=entries), replace=replace)


def read_state(path: str | os.PathLike[str]) -> NestedState:
    """Read the state in a file.

    Raises:
        DamagedState: for a file that was cut off or changed, or that holds no state.
        OSError: for a file that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    file = _file(path)
    content = file.read_bytes()
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error
    header = _header(file, content)
    if header.get("schema") != STATE_SCHEMA or _TEXT not in arrays:
        raise _damaged(file, f"its schema is {header.get('schema')!r} instead of {STATE_SCHEMA!r}")
    try:
        encoded = EncodedState(arrays.pop(_TEXT).tobytes().decode(), arrays)
        if encoded.digest == header.get("sha256"):
            return decode_state(encoded)
    except (UnicodeDecodeError, DamagedState) as error:
        raise _damaged(file, error) from error
    raise _damaged(file, "its content is not that of its checksum")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the texts in a state file's header, without reading the state.

    Raises:
        DamagedState: for a file without a header.
        OSError: for a file that cannot be read.
    """
    file = _file(path)
    with file.open("rb") as handle:
        start = handle.read(8)
        return _header(file, start + handle.read(int.from_bytes(start, "little")))


def _file(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected path as the name of a file, received {short_form(path)}")
    return Path(path)


def _header(path: Path, content: bytes) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    try:
        metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_HEADER])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "it has no header") from error
    return {str(name): str(value) for name, value in metadata.items()}


def _damaged(path: Path, problem: object) -> DamagedState:
    return DamagedState(f"state file {str(path)!r} is damaged: {problem}; delete it")
