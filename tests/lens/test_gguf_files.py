"""A model in one GGUF file: the weights that it stores, its rotation and its tokenizer, and every reason against it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import ModelError
from phaselens.lens import gguf_files, run_checks
from phaselens.lens.model_source import ModelSource
from tests.lens.gguf_models import D_MODEL, N_HEADS, TOKENS, same_model, write_gguf
from tests.lens.saved_adapters import save_adapter
from tests.toys import save_checkpoint

N_PAIRS = D_MODEL // N_HEADS // 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file and the weights that it stores."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return path, write_gguf(path)


@pytest.mark.slow
def test_a_file_loads_with_the_weights_that_it_stores(written) -> None:
    path, weights = written
    lens = phaselens.load(path)
    with torch.no_grad():
        torch.testing.assert_close(lens(TOKENS), same_model(weights)(TOKENS).logits, rtol=0, atol=1e-5)
    state = {
        key.replace("._original_component", ""): value
        for key, value in lens.original_model.state_dict().items()
    }
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    info = lens.info
    assert (info.label, info.family, info.architecture) == ("tiny.Q4_1.gguf", "llama", "LlamaForCausalLM")
    assert (info.quantisation, info.dtype) == ("GGUF Q4_1, dequantised", "float32")
    assert info.files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert all(result.ok for result in run_checks(lens))


@pytest.mark.slow
def test_the_tokenizer_is_that_of_the_file(written) -> None:
    lens = phaselens.load(written[0])
    assert lens.tokenizer_note is None
    assert lens.text_tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    run = phaselens.run([written[0]], metrics="sinks", texts=["ab abab"])
    assert run.models[0].info.files == lens.info.files


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "float64"])
def test_every_dtype_has_the_same_dequantised_weights(written, dtype) -> None:
    lens = phaselens.load(written[0], dtype=dtype)
    weight = lens.original_model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, written[1]["model.layers.0.mlp.down_proj.weight"].to(weight.dtype))


@pytest.mark.slow
def test_files_beside_it_and_in_the_current_folder_are_not_read(written, tmp_path, monkeypatch) -> None:
    """transformers would take a file of the same name in the current folder, and an adapter or tokenizer beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(written[0].read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    (tmp_path / "tiny.gguf").write_bytes(b"another model")
    monkeypatch.chdir(tmp_path)
    lens = phaselens.load("model/tiny.gguf")
    assert lens.text_tokenizer.convert_ids_to_tokens(1) == "<|im_start|>"
    with torch.no_grad():
        torch.testing.assert_close(lens(TOKENS), same_model(written[1])(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_divisors_of_the_frequencies_are_applied(tmp_path) -> None:
    """Llama 3.1 files store how much slower each frequency turns, which transformers does not read."""
    low, high, factor, n_ctx = 1.0, 4.0, 8.0, 64
    frequencies = 10_000.0 ** -(np.arange(N_PAIRS) / N_PAIRS)
    smooth = np.clip((n_ctx * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    assert len(set(divisors.round(3))) > 2
    weights = write_gguf(tmp_path / "tiny.gguf", divisors)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": n_ctx,
    }
    lens = phaselens.load(tmp_path / "tiny.gguf")
    with torch.no_grad():
        expected = same_model(weights, rope_parameters=rope)(TOKENS).logits
        torch.testing.assert_close(lens(TOKENS), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(expected, same_model(weights)(TOKENS).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "its rotation has yarn scaling",
        ),
        ({"split.count": 3}, "one part of a model in several GGUF files.*llama-gguf-split --merge"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(tmp_path, fields, message) -> None:
    write_gguf(tmp_path / "tiny.gguf", fields=fields)
    refused(tmp_path / "tiny.gguf", message)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        phaselens.load(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(written, tmp_path) -> None:
    path = tmp_path / "tiny.gguf"
    content = written[0].read_bytes()
    for damaged in (b"", b"GGUF", b"not a model" * 100, content[:1000], content[: len(content) // 2]):
        path.write_bytes(damaged)
        refused(path, "its GGUF file cannot be read .*truncated or damaged")


def test_an_unknown_architecture_is_refused(written, tmp_path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(written[0].read_bytes().replace(b"llama", b"lamma"))
    refused(path, "lamma is not supported yet")


def test_a_missing_reader_is_named(written, monkeypatch) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    refused(
        written[0], r"the package gguf, which reads it, is not installed; pip install 'phaselens\[gguf\]'"
    )


def test_a_file_too_large_for_memory_is_refused(written, monkeypatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    refused(written[0], "needs 0.0 GB as float32")


def test_a_folder_of_files_names_them(written, tmp_path) -> None:
    (tmp_path / "a.gguf").write_bytes(written[0].read_bytes())
    refused(tmp_path, r"holds no config.json, but GGUF files; name one of them: .*a\.gguf")


def test_another_file_is_not_taken_for_a_model() -> None:
    with pytest.raises(
        ModelError, match=r"is a file; name the checkpoint's folder instead, or a \.gguf file"
    ):
        _ = ModelSource.identify(__file__).location


def test_a_gguf_file_is_the_base_of_an_adapter(written, tmp_path) -> None:
    adapted = save_adapter(same_model(written[1]), tmp_path / "lora", target_modules=["q_proj"])
    lens = phaselens.load(f"{written[0]}+{tmp_path / 'lora'}")
    with torch.no_grad():
        torch.testing.assert_close(lens(TOKENS), adapted(TOKENS).logits, rtol=0, atol=2e-5)
    assert written[0].name in lens.info.files
    assert "adapter/adapter_model.safetensors" in lens.info.files


def test_a_checkpoint_in_a_folder_called_gguf_is_a_folder(tmp_path) -> None:
    save_checkpoint(tmp_path / "odd.gguf")
    assert phaselens.load(tmp_path / "odd.gguf", check=False).info.quantisation is None


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match=r"pipe.gguf' is not a regular file; it is not read"):
        phaselens.load(tmp_path / "pipe.gguf")
