"""What ships of a recalibration: the adapters, their cards and logs, and the loss by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.recalibrate import corpus, export, figures, positions, results
from tools.recalibrate.start import starting_from
from tools.recalibrate.train import checkpoints
from torch.nn import functional

import phaselens
from phaselens.lens import packaged
from phaselens.testing import tiny_model
from tests.tools.recalibration import BOS, TINY

pytest.importorskip("peft")

LIMIT_BYTES = 12_000_000


@pytest.fixture(scope="module")
def texts(cache: Path) -> torch.Tensor:
    return torch.from_numpy(corpus.held_out_windows(corpus.open_stream(cache, "held_out"), 4, 32, BOS))


@pytest.fixture
def finished(start: Any, tmp_path: Path) -> Path:
    """A finished run of the drope twin, with its adapter."""
    folder = tmp_path / "run"
    run = start(folder)
    run.run()
    run.adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
def test_an_exported_adapter_is_the_trained_one_in_float16(
    finished: Path, start: Any, checkpoint: Path, texts: torch.Tensor, tmp_path: Path
) -> None:
    export.export(finished, tmp_path / "shipped")
    trained = load_file(finished / "adapter" / "adapter_model.safetensors")
    shipped = load_file(tmp_path / "shipped" / "adapter_model.safetensors")
    assert shipped.keys() == trained.keys()
    assert all(torch.equal(shipped[name], trained[name].half()) for name in trained)
    written = (tmp_path / "shipped" / "adapter_config.json").read_text()
    assert str(tmp_path) not in written
    assert str(checkpoint) not in written
    assert "Apache License" in (tmp_path / "shipped" / "LICENSE").read_text()
    facts = export.facts_of(str(checkpoint), finished, tmp_path / "shipped", texts)
    assert facts["parameters"] == sum(tensor.numel() for tensor in trained.values())
    assert facts["tokens"] == TINY.tokens
    # The measurement on the shipped file is that of the run itself at its end.
    last_row = json.loads((finished / "log.jsonl").read_text().splitlines()[-1])
    assert facts["loss"] == pytest.approx(last_row["loss"], rel=2e-4)


def test_an_adapter_that_float16_cannot_hold_is_refused(finished: Path, tmp_path: Path) -> None:
    path = finished / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = 1e6
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"does not fit float16; its largest value is 1e\+06"):
        export.export(finished, tmp_path / "shipped")


def test_rounding_that_changes_the_loss_is_refused(
    finished: Path, checkpoint: Path, texts: torch.Tensor, tmp_path: Path
) -> None:
    export.export(finished, tmp_path / "shipped")
    path = tmp_path / "shipped" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="float16 changes the held-out loss from"):
        export.facts_of(str(checkpoint), finished, tmp_path / "shipped", texts)


def test_a_card_states_both_losses() -> None:
    facts = {
        twin: {
            "recipe": TINY.to_dict(),
            "loss": loss,
            "parameters": 2_400_000,
            "bytes": 4_900_000,
            "tokens": 2e6,
        }
        for twin, loss in (("smollm2-drope", 3.75), ("smollm2-rope", 3.25))
    }
    card = export.model_card("smollm2-drope", facts, 32, 512)
    for phrase in (
        "`smollm2-drope`",
        "3.7500 nats",
        "`smollm2-rope` has 3.2500",
        "nulled",
        "2.40 M",
        "4.9 MB",
    ):
        assert phrase in card
    assert "rotation in place" in export.model_card("smollm2-rope", facts, 32, 512)


@pytest.mark.slow
def test_logs_of_runs_in_succession_become_one_curve(start: Any, tmp_path: Path) -> None:
    start(tmp_path / "first").run(stop_step=6)
    checkpoint = checkpoints(tmp_path / "first")[4]
    recipe = starting_from(TINY.replace(tokens=4 * 64, cooldown_tokens=4 * 64, seed=1), checkpoint)
    start(tmp_path / "second", recipe, start_from=checkpoint).run()
    rows = results.gather([tmp_path / "first", tmp_path / "second"])
    assert [row["tokens"] // 64 for row in rows] == [0, 2, 4, 6, 8]
    assert rows[3]["loss"] != pytest.approx(
        json.loads((tmp_path / "first" / "log.jsonl").read_text().splitlines()[3])["loss"], abs=1e-4
    )
    twins = {"rope": rows, "drope": rows}
    figures.training(twins).savefig(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_a_branch_continues_the_curve_of_its_trunk_at_the_cooldown(start: Any, tmp_path: Path) -> None:
    start(tmp_path / "trunk").run(stop_step=8)
    recipe = TINY.replace(tokens=10 * 64, cooldown_tokens=4 * 64)
    start(tmp_path / "end", recipe, branch_from=tmp_path / "trunk").run()
    rows = results.gather([tmp_path / "trunk", tmp_path / "end"])
    assert [row["tokens"] // 64 for row in rows] == [0, 2, 4, 6, 8, 10]


# The shipped adapters

SHIPPED = [name for name, model in packaged.MODELS.items() if model.adapter is not None]
with_adapters = pytest.mark.skipif(
    not set(SHIPPED) <= set(packaged.names()), reason="this version ships no adapters"
)


@with_adapters
def test_the_adapters_together_keep_to_their_size() -> None:
    folders = [packaged.adapter_folder(name) for name in SHIPPED]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= LIMIT_BYTES


@with_adapters
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_changes_every_layer_of_smollm2(name: str) -> None:
    folder = packaged.adapter_folder(name)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    d_model, d_mlp, d_kv, n_layers = 576, 1536, 192, 30
    widths = {
        "q_proj": (d_model, d_model),
        "k_proj": (d_model, d_kv),
        "v_proj": (d_model, d_kv),
        "o_proj": (d_model, d_model),
        "gate_proj": (d_model, d_mlp),
        "up_proj": (d_model, d_mlp),
        "down_proj": (d_mlp, d_model),
    }
    assert len(tensors) == 2 * n_layers * len(config["target_modules"])
    for key, tensor in tensors.items():
        d_in, d_out = widths[key.split(".")[-3]]
        assert tensor.shape == ((config["r"], d_in) if "lora_A" in key else (d_out, config["r"]))
        assert tensor.dtype == torch.float16
        assert tensor.abs().max() > 0
        assert torch.isfinite(tensor).all()
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "SmolLM2-135M-Instruct by Hugging Face" in card


@with_adapters
def test_the_twins_start_alike_and_differ() -> None:
    rope, drope = (
        load_file(packaged.adapter_folder(f"smollm2-{twin}") / "adapter_model.safetensors")
        for twin in ("rope", "drope")
    )
    assert rope.keys() == drope.keys()
    assert not any(torch.equal(rope[name], drope[name]) for name in rope)
    recipes = {
        twin: [
            {**json.loads(path.read_text()), "positions": None, "start_sha256": None}
            for path in sorted(results.RESULTS.glob(f"{twin}-recipe-*.json"))
        ]
        for twin in ("rope", "drope")
    }
    assert recipes["rope"] == recipes["drope"] != []


@with_adapters
def test_the_cards_losses_are_those_of_the_committed_logs() -> None:
    ratios = []
    for twin in ("rope", "drope"):
        last_row = results.read_log(results.RESULTS / f"{twin}.jsonl")[-1]
        card = (packaged.adapter_folder(f"smollm2-{twin}") / "README.md").read_text()
        (measured,) = (line for line in card.splitlines() if "nats per token; the" in line)
        ratios.append(float(measured.split(" nats")[0].split()[-1]) / last_row["loss"])
    # The log has other windows of the same books, which are harder or easier for both twins alike.
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)
    assert ratios[0] == pytest.approx(1, abs=0.05)


# Loss by position


def test_bins_of_positions_double() -> None:
    assert positions.edges(4096) == [1, 64, 128, 256, 512, 1024, 2048, 4096]
    assert positions.edges(100) == [1, 64, 100]
    assert positions.edges(64) == [1, 64]


def test_loss_and_sinks_by_position_are_the_models_own() -> None:
    model = tiny_model("llama")
    lens = phaselens.load(model)
    torch.manual_seed(0)
    windows = torch.randint(0, lens.info.d_vocab, (2, 100))
    losses, sink_rates = positions.by_position(lens, windows)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(windows, output_attentions=True)
    by_token = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    expected = torch.stack([by_token[:, :63].mean(1), by_token[:, 63:].mean(1)], dim=1)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4)
    to_first = torch.stack(output.attentions)[..., 0]
    rates = [
        (to_first[..., low:high].mean(-1) >= 0.3).double().mean(dim=(0, 2))
        for low, high in ((1, 64), (64, 100))
    ]
    np.testing.assert_allclose(sink_rates, torch.stack(rates, dim=1).numpy(), atol=1e-9)


@pytest.mark.slow
def test_a_nulled_model_is_named_by_its_prefix() -> None:
    assert set(positions.load("nope=rope").info.positions) == {"nope"}
    assert set(positions.load("rope").info.positions) == {"rope"}


@pytest.mark.slow
def test_long_windows_are_held_out_text_after_bos(books: Path, tmp_path: Path) -> None:
    (books / "dracula.txt").write_text("the grey sea rose to meet her " * 200)
    (books / "the-adventures-of-sherlock-holmes.txt").write_text("north and north and north " * 200)
    lens = phaselens.load("rope")
    windows = positions.held_out_windows(books, lens, 3, 128)
    assert windows.shape == (3, 128)
    assert (windows[:, 0] == lens.info.bos_token_id).all()
    assert "grey sea" in lens.text_tokenizer.decode(windows[0])
    assert "north and" in lens.text_tokenizer.decode(windows[2])
