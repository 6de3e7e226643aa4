"""Models that `phaselens run` reads from the local cache of the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine
from tests.toys import save_in_hub_cache

HUB = """
import os, sys
from phaselens.cli import main
import socket
def refuse(*args, **kwargs): raise AssertionError("the network was touched")
socket.socket.connect = refuse
socket.create_connection = refuse
main()
"""


def hub(cache: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", HUB, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "label=gpt2", "gpt2@main"])
def test_gpt2_is_a_hub_id(tmp_path: Path, texts: Path, name: str) -> None:
    save_in_hub_cache(tmp_path / "hub", "gpt2", "gpt2")
    result = hub(tmp_path, "run", name, "-p", "sinks", "--texts", texts, "--format", "json")
    assert (result.returncode, result.stderr) == (0, "")
    (model,) = json.loads(result.stdout)["models"]
    assert model["family"] == "gpt2"
    assert model["label"] == ("label" if name.startswith("label") else "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hint"), [("gpt2", ""), ("ropee", "did you mean rope?"), ("tiny-model_1.5", "")]
)
def test_a_hub_id_that_is_not_cached_touches_no_network_offline(tmp_path: Path, name: str, hint: str) -> None:
    process = hub(tmp_path, "run", name, "-p", "sinks")
    assert process.returncode == 3
    assert process.stdout == ""
    assert "HF_HUB_OFFLINE is set" in process.stderr
    assert process.stderr.rstrip("\n").endswith(hint or "name a folder")


@pytest.mark.parametrize("name", ["no model", "a--b", "a..b", ".hidden", "-x", "x" * 97, "a/b c", "ends-"])
def test_an_invalid_hub_id_is_refused(error_line: ErrorLine, name: str) -> None:
    message = error_line(3, "run", "-p", "sinks", "--", name)
    assert (
        "neither one of rope, drope, smollm2, smollm2-drope, smollm2-rope, nor a folder, nor a hub id"
        in message
        or "no such folder" in message
    )
