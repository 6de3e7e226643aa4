"""Configs and tokenizers that declare sizes which their files do not hold are refused before anything is built."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import phaselens
from phaselens.errors import ModelError
from phaselens.lens.declared_sizes import require_sizes
from tests.toys import letters, save_checkpoint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**6), ("num_hidden_layers", 10**12), ("vocab_size", 10**9), ("hidden_size", 10**12),
        ("intermediate_size", 10**9), ("num_attention_heads", 10**9), ("max_position_embeddings", 10**15),
    ],
)  # fmt: skip
def test_a_size_beyond_the_weights_is_refused_with_the_numbers(
    tmp_path: Path, field: str, value: int
) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    start = time.process_time()
    with pytest.raises(ModelError, match=f"declares {field} {value:,}.*its weights hold 21 tensors"):
        phaselens.load(folder)
    assert time.process_time() - start < 5


def test_nested_configs_and_packed_weights_are_known() -> None:
    require_sizes(
        {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100}}, 20, 1000, "a"
    )
    with pytest.raises(ModelError, match="declares num_hidden_layers 200"):
        require_sizes({"text_config": {"num_hidden_layers": 200}}, 20, 1000, "a")


def test_an_id_far_beyond_the_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = 10**9
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"tokenizer.json has the id 1,000,000,000, but only"):
        phaselens.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"{}", b"[1", b'{"model": {"type": "BPE", "vocab": 3}}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="tokenizer") as raised:
        phaselens.run(folder, metrics="sinks", texts=[letters(5)])
    assert "\n" not in str(raised.value)
