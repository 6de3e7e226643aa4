"""A checkpoint is read from its own regular files alone, whole, and without starting another program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import phaselens
from phaselens.errors import ModelError
from phaselens.testing import tiny_model
from tests.toys import save_checkpoint, save_in_hub_cache


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        phaselens.load(folder)
    assert "\n" not in str(raised.value)


def test_tensors_that_the_model_does_not_use_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "qwen2"
    tiny_model("qwen2").save_pretrained(folder)
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    refused(
        folder, r"holds 6 tensors that the model does not use \(first: model.layers.0.self_attn.k_proj.bias\)"
    )


def test_a_model_with_fewer_layers_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny", num_hidden_layers=3)
    change_config(folder, num_hidden_layers=2)
    refused(
        folder,
        "tensors that the model does not use .first: model.layers.2.*; check model_type, num_hidden_layers",
    )


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert phaselens.load(folder).info.n_layers == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "extra.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    outside = tmp_path / f"outside-{name}"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    refused(folder, f"{re.escape(name)} is a link out of the checkpoint's folder; copy the file there")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_is_not_opened(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{re.escape(name)} is not a regular file; it is not read|holds no config.json")


def test_the_store_of_the_hub_cache_is_part_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = save_in_hub_cache(tmp_path, "org/model")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "..", "blobs", str(number)))
    assert phaselens.load(snapshot).info.n_layers == 2


@pytest.mark.parametrize(
    "value", ["w.bin", "part/model.safetensors", "model.safetensors.index.json", "..safetensors"]
)
def test_an_index_names_plain_safetensors_files(tmp_path: Path, value: str) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    tensors = load_file(folder / "decoy.safetensors")
    torch.save(tensors, folder / "w.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, value)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names weights outside|not safetensors|as a file with weights")


@pytest.mark.slow
def test_no_program_is_started_because_of_a_config(tmp_path: Path) -> None:
    """An RWKV model of transformers would compile kernels with ninja."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=32, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=16
    )
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    script = (
        "import sys, phaselens\n"
        "from phaselens.lens import load\n"
        "def watch(event, arguments):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.posix_spawn'):\n"
        "        raise RuntimeError(f'{event} {arguments}')\n"
        "sys.addaudithook(watch)\n"
        f"print(phaselens.load({str(tmp_path)!r}, check=False).info.n_layers)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.stdout == "2\n", process.stderr[-500:]
