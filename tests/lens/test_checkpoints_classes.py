"""The class that loads a checkpoint: that of transformers' table, or the one that a text model names itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.errors import RefusedModel
from tests.toys import save_checkpoint


def test_a_text_model_that_the_table_lists_only_inside_a_whole_is_loaded_by_its_own_class(
    tmp_path: Path,
) -> None:
    from transformers import Emu3ForCausalLM
    from transformers.models.emu3.configuration_emu3 import Emu3TextConfig

    config = Emu3TextConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Emu3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    lens = phaselens.load(tmp_path)
    tokens = torch.tensor([[0, 5, 7, 9]])
    with torch.no_grad():
        assert torch.equal(lens.stream(tokens, unembed=True), model(tokens).logits)


@pytest.mark.parametrize(
    ("model_type", "architectures", "named"),
    [("vit", ["ViTForImageClassification"], "ViTForImageClassification"), ("vit", None, "not named")],
)
def test_a_checkpoint_without_a_causal_class_is_refused_by_name(
    tmp_path: Path, model_type: str, architectures: list[str] | None, named: str
) -> None:
    save_checkpoint(tmp_path)
    config = {"model_type": model_type, "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedModel) as refused:
        phaselens.load(tmp_path)
    assert f"has no causal language model of type 'vit' (the checkpoint's class is {named})" in str(
        refused.value
    )
    assert str(refused.value).endswith("use a checkpoint of a causal language model")
