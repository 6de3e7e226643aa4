"""Impossible values in a config are refused by the field, its value and what it should be."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import phaselens
from phaselens.errors import ModelError
from phaselens.lens.declared_values import require_values
from tests.toys import save_checkpoint

CASES: list[tuple[str, Any, str]] = [
    ("num_attention_heads", 0, "a whole number of at least 1"),
    ("num_hidden_layers", -1, "a whole number of at least 1"),
    ("head_dim", 2.5, "a whole number of at least 1"),
    ("hidden_size", "32", "a whole number of at least 1"),
    ("intermediate_size", [], "a whole number of at least 1"),
    ("vocab_size", True, "a whole number of at least 1"),
    ("sliding_window", -1, "a whole number of at least 1"),
    ("attn_logit_softcapping", 0, "a number above 0"),
    ("final_logit_softcapping", -3.0, "a number above 0"),
    ("query_pre_attn_scalar", -1, "a number above 0"),
    ("rms_norm_eps", float("nan"), "a number of at least 0"),
    ("rotary_pct", 1.5, "a number from 0 to 1"),
    ("logits_scaling", "x", "a number"),
    ("return_dict", False, "true"),
    ("return_dict", None, "true"),
    ("output_hidden_states", "x", "true or false"),
    ("architectures", "LlamaForCausalLM", "a list of texts"),
    ("layer_types", 3, "a list of texts"),
    ("model_type", [1], "text"),
    ("dtype", "x", "the name of a dtype of torch"),
    ("rope_scaling", 4, "an object"),
    ("text_config", "x", "an object"),
    ("num_labels", 10**9, "a whole number from 0 to 1,000,000"),
    ("pad_token_id", 67, "an id below the vocab_size of 67, or null"),
]


@pytest.mark.parametrize(("field", "value", "expected"), CASES)
def test_the_message_names_field_value_and_what_it_should_be(field: str, value: Any, expected: str) -> None:
    config = {"model_type": "llama", "vocab_size": 67} | {field: value}
    with pytest.raises(ModelError) as raised:
        require_values(config, "m")
    message = f"model 'm': config.json has {field} {json.dumps(value)}; it should be {expected}; fix it"
    assert str(raised.value).startswith(message)


def test_a_rotation_and_a_text_model_are_checked_too() -> None:
    for config in (
        {"rope_parameters": {"rope_type": "yarn", "factor": -1}},
        {"rope_parameters": {"full_attention": {"factor": -1}}},
        {"text_config": {"rope_scaling": {"factor": -1}}},
    ):
        with pytest.raises(ModelError, match="factor -1; it should be a number above 0"):
            require_values(config, "m")


def test_more_chosen_experts_than_there_are_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"num_experts_per_tok 9; it should be .* 1 to the num_local_experts of 4"
    ):
        require_values({"num_local_experts": 4, "num_experts_per_tok": 9}, "m")


def test_what_checkpoints_do_say_passes() -> None:
    require_values(
        {
            "model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0, "head_dim": None,
            "pad_token_id": -1, "n_inner": None, "sliding_window": 0, "use_sliding_window": False,
            "num_key_value_heads": [4, 0, 4], "dtype": "bfloat16", "rope_scaling": {"type": "linear", "factor": 2},
            "use_cache": True, "id2label": {"0": "A"}, "rope_theta": 10000,
        },
        "m",
    )  # fmt: skip


def test_long_values_are_cut() -> None:
    with pytest.raises(
        ModelError, match=re.escape("config.json has head_dim of more than 18 digits; it should be")
    ):
        require_values({"head_dim": -(10**30)}, "m")
    with pytest.raises(ModelError) as raised:
        require_values({"head_dim": "x" * 100_000}, "m")
    assert len(str(raised.value)) < 250


def test_a_config_is_checked_before_it_is_loaded(tmp_path: Any) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 0}))
    with pytest.raises(ModelError, match="num_key_value_heads 0; it should be a whole number of at least 1"):
        phaselens.load(folder)
