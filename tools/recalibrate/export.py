"""Ship finished adapters as package data: float16, with a model card, measured as a user loads them.

`python -m tools.recalibrate.export --drope RUN --rope RUN --cache DIR` writes the twins of `smollm2`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tools.recalibrate import corpus, network
from tools.recalibrate.measure import held_out_loss
from tools.recalibrate.recipe import RecalibrationRecipe

import phaselens
from phaselens.lens import packaged
from phaselens.lens.weight_adapters import apply_adapter

MODELS = Path(phaselens.__file__).parent / "data" / "models"
CARD = Path(__file__).with_name("card.md")
# The licence of the base model, which holds for the adapter too.
LICENCE = Path(__file__).with_name("LICENSE")
# The largest relative change of the held-out loss that rounding to float16 may cause.
ROUNDING = 1e-3
# What peft needs to load the adapter; its other settings are for training.
_CONFIG = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "bias",
)
BASE = "smollm2"
# The base model's name on the hub, for peft.
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TWINS = {"smollm2-drope": "nope", "smollm2-rope": "rope"}


def export(run: Path, out: Path) -> None:
    """Write a run's finished adapter to `out` in float16, with nothing of the machine it was trained on.

    Raises:
        ValueError: for a value that float16 cannot hold.
    """
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    rounded = {name: tensor.to(torch.float16).contiguous() for name, tensor in sorted(trained.items())}
    for name, tensor in rounded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} does not fit float16; its largest value is {trained[name].abs().max():.3g}"
            )
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    kept = {
        name: sorted(config[name]) if isinstance(config[name], list) else config[name] for name in _CONFIG
    }
    out.mkdir(parents=True, exist_ok=True)
    recipe = RecalibrationRecipe.read(run / "recipe.json")
    facts = {"positions": recipe.positions, "trained_tokens": str(recipe.end_tokens)}
    save_file(rounded, out / "adapter_model.safetensors", metadata={"format": "pt", **facts})
    written = {"base_model_name_or_path": HUB_BASE, "inference_mode": True, **kept}
    (out / "adapter_config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(LICENCE, out / "LICENSE")
    for file in out.iterdir():
        file.chmod(0o644)


def loss_with(base: str, adapter: Path, positions: str, texts: torch.Tensor) -> float:
    """Return the held-out loss, in float32, of a base model with the adapter in a folder."""
    model, _ = network.load(base)
    if positions == "nope":
        network.null_rotation(model)
    apply_adapter(model, adapter, str(adapter))
    head = model.get_output_embeddings().weight.detach()
    return held_out_loss(model.eval(), head, texts)


def facts_of(base: str, run: Path, adapter: Path, texts: torch.Tensor) -> dict[str, Any]:
    """Measure a shipped adapter for its model card.

    Raises:
        ValueError: if rounding to float16 changes the held-out loss by more than a thousandth.
    """
    recipe = RecalibrationRecipe.read(run / "recipe.json")
    exact, rounded = (
        loss_with(base, folder, recipe.positions, texts) for folder in (run / "adapter", adapter)
    )
    if abs(rounded / exact - 1) > ROUNDING:
        raise ValueError(f"float16 changes the held-out loss from {exact:.5f} to {rounded:.5f}")
    n_parameters = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    return {
        "recipe": recipe.to_dict(),
        "loss": rounded,
        "parameters": n_parameters,
        "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "tokens": recipe.end_tokens,
    }


def model_card(twin: str, facts: dict[str, dict[str, Any]], n_texts: int, text_tokens: int) -> str:
    """Return the README of a twin from the facts of both."""
    other = next(name for name in TWINS if name != twin)
    recipe = facts[twin]["recipe"]
    rotation = (
        "with its rotation nulled (cos = 1, sin = 0)"
        if TWINS[twin] == "nope"
        else "with its rotation in place"
    )
    return CARD.read_text(encoding="utf-8").format(
        twin=twin,
        other=other,
        rotation=rotation,
        loss=facts[twin]["loss"],
        other_loss=facts[other]["loss"],
        millions=facts[twin]["parameters"] / 1e6,
        megabytes=facts[twin]["bytes"] / 1e6,
        tokens=facts[twin]["tokens"] / 1e6,
        rank=recipe["rank"],
        targets=", ".join(recipe["targets"]),
        n_texts=n_texts,
        text_tokens=text_tokens,
    )


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate.export", description=__doc__)
    p.add_argument("--drope", type=Path, required=True, help="finished run with the rotation nulled")
    p.add_argument("--rope", type=Path, required=True, help="finished run with the rotation in place")
    p.add_argument("--cache", type=Path, required=True, help="token streams of both runs")
    p.add_argument("--out", type=Path, default=MODELS)
    p.add_argument("--windows", type=int, default=32, help="held-out windows for the loss")
    args = p.parse_args()
    runs = {"smollm2-drope": args.drope, "smollm2-rope": args.rope}
    _, tokenizer = network.load(BASE)
    held_out = corpus.open_stream(args.cache, "held_out")
    texts = torch.from_numpy(corpus.held_out_windows(held_out, args.windows, 512, tokenizer.bos_token_id))
    facts = {}
    for twin, run in runs.items():
        export(run, args.out / str(packaged.MODELS[twin].adapter))
        facts[twin] = facts_of(BASE, run, args.out / str(packaged.MODELS[twin].adapter), texts)
    for twin in TWINS:
        card = model_card(twin, facts, len(texts), texts.shape[1])
        (args.out / str(packaged.MODELS[twin].adapter) / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps({twin: {**values, "recipe": None} for twin, values in facts.items()}, indent=1))


if __name__ == "__main__":
    main()
