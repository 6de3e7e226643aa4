"""`phaselens run` on GGUF files, and on a base with an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phaselens.testing import tiny_model
from tests.cli.conftest import ErrorLine, Phaselens
from tests.lens.saved_adapters import save_adapter

RUN = ("run", "-p", "sinks", "--n-texts", "2", "--max-tokens", "16", "--format", "json", "--quiet")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(tiny_model("llama"), tmp_path / "lora", target_modules=["q_proj"])
    return tmp_path / "lora"


@pytest.mark.slow
def test_a_gguf_file_is_a_model(phaselens: Phaselens, tmp_path: Path) -> None:
    from tests.lens.gguf_models import write_gguf

    write_gguf(tmp_path / "model.gguf")
    outcome = phaselens(*RUN, tmp_path / "model.gguf")
    assert (outcome.code, outcome.err) == (0, "")
    (model,) = json.loads(outcome.out)["models"]
    assert (model["label"], model["quantisation"]) == ("model.gguf", "GGUF Q4_1, dequantised")


@pytest.mark.slow
def test_base_and_adapter_are_a_model(phaselens: Phaselens, checkpoint: Path, adapter: Path) -> None:
    outcome = phaselens(*RUN, f"{checkpoint}+{adapter}", "--adapter-scale", "0.5")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    (model,) = result["models"]
    assert (model["label"], model["adapter"]) == ("tiny+lora", "LORA adapter lora, kept apart, scale 0.5")
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= set(model["files"])
    assert result["options"]["adapter_scale"] == 0.5


@pytest.mark.slow
def test_a_scale_of_one_label_leaves_other_models_alone(
    phaselens: Phaselens, checkpoint: Path, adapter: Path
) -> None:
    name = f"{checkpoint}+{adapter}"
    outcome = phaselens(*RUN, f"half={name}", f"merged={name}", checkpoint, "--adapter-scale", "half=0.5")
    adapters = [model["adapter"] for model in json.loads(outcome.out)["models"]]
    assert adapters == ["LORA adapter lora, kept apart, scale 0.5", "LORA adapter lora, merged", None]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (["x"], "--adapter-scale 'x': write a number from 0 to 1, or LABEL=NUMBER"),
        (["2"], "adapter_scale is 2.0; give a number from 0 (the base) to 1"),
        (["0.5", "a=1"], "give one number for all models, or LABEL=NUMBER for each"),
        (["nobody=1"], "no model is labelled 'nobody'"),
        (["tiny=1"], "has no adapter; write BASE+ADAPTER"),
    ],
)
def test_a_wrong_scale_is_refused(
    error_line: ErrorLine, checkpoint: Path, scales: list[str], message: str
) -> None:
    options = [argument for scale in scales for argument in ("--adapter-scale", scale)]
    assert message in error_line(2, *RUN, checkpoint, *options)


def test_a_missing_base_is_one_line(error_line: ErrorLine, adapter: Path) -> None:
    assert "names no base model" in error_line(3, *RUN, adapter)


def test_several_models_are_checked_before_any_is_measured(
    error_line: ErrorLine, checkpoint: Path, adapter: Path
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "truncated or damaged" in error_line(3, *RUN, checkpoint, f"{checkpoint}+{adapter}")
