"""What transformers raises about a config is told by the field that causes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import ModelError
from tests.toys import save_checkpoint

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": 0}, "config.json has attention_bias 0; it should be true or false"),
    ("llama", {"eos_token_id": "x"}, 'has eos_token_id "x"; it should be a whole number or a list or null'),
    (
        "llama",
        {"num_attention_heads": 5},
        "fields that contradict each other: The hidden size .32. is not a multiple",
    ),
    (
        "llama",
        {"hidden_act": "x"},
        'has hidden_act "x", with which transformers cannot build a model of type "llama"',
    ),
    ("llama", {"rope_parameters": {"rope_type": "x"}}, 'has rope_parameters {"rope_type": "x"}, with which'),
    ("llama", {"text_config": {}}, "has text_config {}, with which transformers cannot build"),
    ("llama", {"model_type": "x"}, 'has model_type "x", which this version of transformers does not know'),
    (
        "llama",
        {"num_key_value_heads": 2},
        r"4 of its weights have other shapes than its config.json says \(first: model.layers.0.self_attn.k_proj."
        r"weight, \[32, 32\] in the weights and \[16, 32\] by the config\); take both from one checkpoint",
    ),
    (
        "gpt2",
        {"resid_pdrop": 5},
        'has resid_pdrop 5, with which transformers cannot build a model of type "gpt2"',
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "fields", "message"), CASES)
def test_the_field_is_named(tmp_path: Path, family: str, fields: dict[str, Any], message: str) -> None:
    folder = save_checkpoint(tmp_path / "tiny", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ModelError, match=message) as raised:
        phaselens.load(folder)
    assert "\n" not in str(raised.value)
