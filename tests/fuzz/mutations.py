"""Mutations of the files that a command reads. Each draws from a `random.Random`, so that hypothesis can repeat it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

#: Values that take the place of others in JSON.
VALUES: tuple[Any, ...] = (
    0, -1, 1, 3, 7, 10**6, 10**12, 10**30, 0.5, -0.5, float("nan"), float("inf"), True, False, None, "", "x", "\ud800",
    "../../secret.safetensors", "/etc/passwd", "\x1b[31m", "9" * 5000, [], [1], ["x"], [[]], {}, {"type": "x"},
    {"x": [1]},
)  # fmt: skip
_MOST_CHILDREN = 12


def mutate_json(rng: Random, content: Any) -> Any:
    """Return JSON with one value replaced, removed, moved or added."""
    paths = [path for path in _paths(content) if path]
    if not paths:
        return rng.choice(VALUES)
    *parents, key = rng.choice(paths)
    node = content
    for parent in parents:
        node = node[parent]
    match rng.choice(("replace", "replace", "replace", "remove", "swap", "add")):
        case "replace":
            node[key] = rng.choice(VALUES)
        case "remove":
            del node[key]
        case "swap":
            other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key], node[other] = node[other], node[key]
        case _ if isinstance(node, dict):
            node[rng.choice(("x", "auto_map", "quantization_config", "text_config", "sliding_window"))] = (
                rng.choice(VALUES)
            )
        case _:
            node.append(rng.choice(VALUES))
    return content


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(node, dict):
        for key in list(node)[:_MOST_CHILDREN]:
            yield from _paths(node[key], (*path, key))
    elif isinstance(node, list):
        for index in range(min(len(node), 3)):
            yield from _paths(node[index], (*path, index))


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """Return bytes with some changed, inserted or cut off."""
    if not content:
        return b"\0"
    place = rng.randrange(len(content))
    match rng.choice(("change", "change", "insert", "cut", "head", "empty")):
        case "change":
            return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        case "insert":
            return content[:place] + bytes(rng.randrange(256) for _ in range(3)) + content[place:]
        case "cut":
            return content[:place]
        case "head":
            return content[place:]
    return b""


def mutate_header(rng: Random, content: bytes) -> bytes:
    """Return a safetensors file with a changed header, whose length fits."""
    length = struct.unpack("<Q", content[:8])[0]
    header = mutate_json(rng, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def mutate_checkpoint(rng: Random, folder: Path) -> str:
    """Change a file of a checkpoint, and return what was changed."""
    name = rng.choice(
        ("config.json",) * 4 + ("tokenizer.json",) * 3 + ("tokenizer_config.json", "generation_config.json")
        + ("model.safetensors",) * 2 + ("model.safetensors.index.json",)
    )  # fmt: skip
    path = folder / name
    if name.endswith("index.json"):
        with_index(folder)
    if path.is_symlink() or not path.is_file():  # another change has replaced it
        return f"{name} is no file"
    how = rng.choice(("structure",) * 8 + ("bytes",) * 3 + ("link", "pipe", "folder", "absent"))
    if how == "structure":
        path.write_bytes(_with_other_structure(rng, path))
    elif how == "bytes":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        path.unlink()
        if how == "link":
            path.symlink_to(
                rng.choice(("../../secret.safetensors", "/etc/passwd", "/dev/zero", "nowhere", name))
            )
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
    return f"{name}: {how}"


def _with_other_structure(rng: Random, path: Path) -> bytes:
    """Return a file's content with changed JSON; with changed bytes if another change has left none."""
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            return json.dumps(mutate_json(rng, json.loads(content))).encode("utf-8", "surrogatepass")
        return mutate_header(rng, content)
    except (ValueError, struct.error):
        return mutate_bytes(rng, content)


def with_index(folder: Path) -> None:
    """Give a checkpoint an index that maps all tensors to one shard."""
    single = folder / "model.safetensors"
    if single.is_symlink() or not single.is_file():
        return
    content = single.read_bytes()
    try:
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    except (ValueError, struct.error):  # another change has left no header
        return
    if not isinstance(header, dict):
        return
    names = [name for name in header if not name.startswith("_")]
    shard = "model-00001-of-00001.safetensors"
    single.rename(folder / shard)
    index = {"metadata": {"total_size": len(content)}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
