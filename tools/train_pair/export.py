"""Export two checkpoints as Hugging Face folders: float16 safetensors, config, tokenizer, model card."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tools.train_pair import card, corpus
from tools.train_pair.measure import measure
from tools.train_pair.model import llama_config
from tools.train_pair.recipe import PairRecipe
from tools.train_pair.train import CHECKPOINT, LOG
from tools.train_pair.verify import expected_properties, through_lens
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

# Registers llama_drope with transformers' Auto classes.
import phaselens  # noqa: F401
from phaselens.lens.drope import DroPELlamaConfig, DroPELlamaForCausalLM

TWINS = ("rope", "drope")
# The largest relative change of the held-out loss that rounding to float16 may cause.
ROUNDING = 1e-3


def as_model(recipe: PairRecipe, twin: str, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return the twin in its published class (`llama` or `llama_drope`), in float32."""
    config = llama_config(recipe)
    config.use_cache = True
    if twin == "rope":
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        values = {
            key: value
            for key, value in config.to_dict().items()
            if key not in ("model_type", "architectures")
        }
        model = DroPELlamaForCausalLM(DroPELlamaConfig(**values, attention_type="nope"))
    model.load_state_dict(weights)
    return model.eval()


def held_out_texts(cache: Path, recipe: PairRecipe, n_windows: int = 128) -> torch.Tensor:
    """Return evenly spaced held-out windows, [text, position]: 256 tokens, or the model's n_ctx if it is smaller."""
    stream = corpus.open_stream(cache, "held_out")
    return torch.from_numpy(corpus.held_out_windows(stream, n_windows, min(256, recipe.max_positions)))


def export_twin(recipe: PairRecipe, twin: str, run: Path, cache: Path, out: Path) -> dict[str, Any]:
    """Write one folder and load it as a user would; refuse rounding that overflows or costs too much loss.

    Returns the twin's facts for the model card and the results file.
    """
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    texts = held_out_texts(cache, recipe)
    exact = measure(as_model(recipe, twin, state["model"]), texts)
    model = as_model(recipe, twin, state["model"]).to(torch.float16)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{twin}: {name} does not fit float16; largest {state['model'][name].abs().max():.3g}"
            )
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    tokenizer.model_max_length = recipe.max_positions
    tokenizer.save_pretrained(out)
    _tidy(out)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rounded = through_lens(str(out), texts)
    cost = abs(rounded["loss"] / exact["loss"] - 1)
    if not math.isfinite(cost) or cost > ROUNDING:
        raise ValueError(
            f"{twin}: float16 changes the held-out loss from {exact['loss']:.5f} to {rounded['loss']:.5f}"
        )
    last_row = json.loads((run / LOG).read_text(encoding="utf-8").splitlines()[-1])
    return {
        "class": type(reloaded).__name__,
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "trained_tokens": last_row["tokens"],
        "branch_tokens": recipe.tokens_at(state["branch_step"]),
        "seconds": last_row["seconds"],
        "float32_loss": exact["loss"],
        "n_texts": len(texts),
        "text_tokens": texts.shape[1],
        **rounded,
    }


def _tidy(folder: Path) -> None:
    """Remove sampling defaults and the tokenizer's original path from the exported files."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    tokens = {
        key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")
    }
    # The name that every version of transformers knows.
    tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def export(recipe: PairRecipe, runs: Path, cache: Path, out: Path) -> dict[str, Any]:
    """Write `out`/rope and `out`/drope, and `out`/pair.json with the measurements on them."""
    facts: dict[str, Any] = {"recipe": recipe.to_dict()}
    facts["books"] = json.loads((cache / "books.json").read_text(encoding="utf-8"))
    for twin in TWINS:
        facts[twin] = export_twin(recipe, twin, runs / twin, cache, out / twin)
    facts["shown"] = expected_properties(facts["rope"], facts["drope"])
    for twin in TWINS:
        (out / twin / "README.md").write_text(card.model_card(twin, facts), encoding="utf-8")
    (out / "pair.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts
