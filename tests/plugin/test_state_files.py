"""Files of states: complete or absent, and refused where damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phaselens.plugin import DamagedState, read_state, write_state
from phaselens.plugin.state_files import read_metadata

TREE = {"values": np.arange(6.0).reshape(2, 3), "names": ["a", "b"], "flags": np.array([True]), "none": None}


def test_a_file_returns_the_state_and_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_state(path, TREE, metadata={"model": "rope"})
    tree = read_state(path)
    assert tree["values"].tolist() == TREE["values"].tolist()  # type: ignore[attr-defined]
    assert (tree["names"], tree["none"]) == (["a", "b"], None)
    assert read_metadata(path)["model"] == "rope"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_state(tmp_path / name, TREE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_state_can_be_stored(tmp_path: Path) -> None:
    write_state(tmp_path / "x", {})
    assert read_state(tmp_path / "x") == {}


def test_every_cut_of_a_file_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_state(path, TREE)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedState, match="is damaged: "):
            read_state(path)
    for index in range(0, len(content), 5):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        try:
            tree = read_state(path)
        except DamagedState:
            continue
        # Only white space and the metadata of the header are outside of the checksum.
        assert tree["values"].tolist() == TREE["values"].tolist()  # type: ignore[attr-defined]
        assert index < 8 + int.from_bytes(content[:8], "little")


def test_a_value_that_cannot_be_stored_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.x is a builtin"):
        write_state(tmp_path / "x", {"x": print})
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_left_as_it_is_unless_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_state(path, {"a": 1})
    write_state(path, {"a": 2})
    assert read_state(path) == {"a": 1}
    write_state(path, {"a": 2}, replace=True)
    assert read_state(path) == {"a": 2}


def test_a_header_without_metadata_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(DamagedState, match="it has no header"):
        read_metadata(tmp_path / "x")
