"""Installed plugins are read from metadata, also where that of one distribution is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaselens.plugin.registry import Selection, installed_plugins


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("METADATA", b"\xff\xfe\0Name: broken\n"),
        ("entry_points.txt", b"\xff\xfe[phaselens\n"),
        ("METADATA", None),
    ],
)
def test_a_distribution_that_cannot_be_read_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes | None
) -> None:
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[phaselens]\nbroken = no_such_module\n")
    if content is None:
        (folder / file).unlink()
        (folder / file).mkdir()
    else:
        (folder / file).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    registered = {plugin.name: plugin for plugin in installed_plugins(Selection())}
    assert registered["sinks"].status == "ok"
    if file == "METADATA" and content is not None:
        assert registered["broken"].status == "failed"
        assert (
            "metadata of its distribution cannot be read: UnicodeDecodeError" in registered["broken"].reason
        )
