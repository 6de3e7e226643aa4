"""Digests of files follow every change, and an unchanged file is read once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from phaselens.lens.digests import sha256


def test_an_unchanged_file_is_read_once(tmp_path: Path, read_for_digests: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert sha256(file) == sha256(file) == hashlib.sha256(b"abc").hexdigest()
    assert read_for_digests == [file]


def test_a_change_of_the_same_size_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for number, content in enumerate((b"abc", b"abd", b"xyz")):
        file.write_bytes(content)
        os.utime(file, ns=(0, number))
        assert sha256(file) == hashlib.sha256(content).hexdigest()


def test_a_relative_path_belongs_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("abc", "xyz"):
        folder = tmp_path / content
        folder.mkdir()
        (folder / "weights").write_text(content)
        os.utime(folder / "weights", ns=(0, 0))
        monkeypatch.chdir(folder)
        assert sha256(Path("weights")) == hashlib.sha256(content.encode()).hexdigest()
