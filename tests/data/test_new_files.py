"""Files appear complete or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from phaselens.data import new_files
from phaselens.data.new_files import remove_abandoned, whole_file, write_new


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_new_file_is_written(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_exists_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_links(*paths: object) -> None:
        raise PermissionError("no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    assert write_new(tmp_path / "a", b"one")
    assert not write_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert write_new(tmp_path / "a", b"two", replace=True)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


def test_a_file_that_appears_while_another_is_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    created: list[bool] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        created.append(write_new(path, bytes([number]) * 100_000))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(created) == 1
    assert len(set(path.read_bytes())) == 1
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "a", b"one")
    assert names(tmp_path) == []


def test_only_old_partial_files_are_removed(tmp_path: Path) -> None:
    old, recent = (tmp_path / f".a.1-{name}{new_files.PARTIAL}" for name in ("old", "recent"))
    for path in (old, recent, tmp_path / "a"):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(tmp_path / "a", (0, 0))
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(["a", recent.name])


def test_a_file_that_could_not_be_written_whole_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "the disk is full")

    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        fail(partial)
    assert list(tmp_path.iterdir()) == []
    for content in (b"first", b"second"):
        with whole_file(path) as partial:
            partial.write_bytes(content)
        assert path.read_bytes() == content
