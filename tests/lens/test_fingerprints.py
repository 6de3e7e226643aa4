"""The digests of a model's files: checkpoints, GGUF files and adapters; any change of one of them shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phaselens.lens.digests import sha256
from phaselens.lens.fingerprints import file_digests, weights_digest
from phaselens.lens.model_source import ModelSource
from tests.toys import save_checkpoint, toy_lens


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "base")


def written_adapter(folder: Path, base: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of the model")
    return folder


def digests(name: object) -> dict[str, str]:
    files = file_digests(ModelSource.identify(str(name)))
    assert files is not None
    return files


def test_a_folder_has_the_digest_of_every_file_that_makes_the_model(checkpoint: Path) -> None:
    (checkpoint / "notes.md").write_text("not part of the model")
    files = digests(checkpoint)
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert "notes.md" not in files
    assert files["model.safetensors"] == sha256(checkpoint / "model.safetensors")


def test_a_gguf_file_has_its_own_digest(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF one")
    before = digests(file)
    assert before == {"tiny.gguf": sha256(file)}
    file.write_bytes(b"GGUF two")
    assert digests(file).keys() == before.keys()
    assert digests(file) != before


@pytest.mark.parametrize("named", ["BASE+ADAPTER", "ADAPTER"])
def test_an_adapter_adds_its_files_to_those_of_its_base(checkpoint: Path, tmp_path: Path, named: str) -> None:
    adapter = written_adapter(tmp_path / "adapter", checkpoint)
    name = f"{checkpoint}+{adapter}" if named == "BASE+ADAPTER" else adapter
    files = digests(name)
    adapter_files = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files.keys() - adapter_files == digests(checkpoint).keys()
    assert adapter_files <= files.keys()
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    changed = digests(name)
    assert {file for file in files if files[file] != changed[file]} == {"adapter/adapter_model.safetensors"}


def test_a_gguf_file_with_an_adapter_has_both(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    adapter = written_adapter(tmp_path / "adapter", file)
    assert digests(f"{file}+{adapter}").keys() == {
        "tiny.gguf",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }


@pytest.mark.slow
def test_weights_that_were_not_loaded_from_files_have_a_digest_of_their_own() -> None:
    assert weights_digest(toy_lens()) == weights_digest(toy_lens())
    assert weights_digest(toy_lens()) != weights_digest(toy_lens(seed=1))
