"""The recalibration recipe, run small: a random Llama, books made up here, seconds."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools.recalibrate import corpus, network
from tools.recalibrate.__main__ import main
from tools.recalibrate.export import export
from tools.recalibrate.loss import CHUNK, next_token_loss
from tools.recalibrate.measure import sinks_and_spike
from tools.recalibrate.recipe import RecalibrationRecipe
from tools.recalibrate.start import starting_from
from tools.recalibrate.train import CHECKPOINTS, Recalibration, checkpoints
from tools.train_pair import corpus as pair_corpus
from tools.train_pair.corpus import train_tokenizer
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from phaselens.errors import ModelError
from tests.tools.books import same
from tests.tools.recalibration import BOS, TINY

pytest.importorskip("peft")


def values(run: Recalibration) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.parameters.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Data


def test_held_out_books_are_not_in_the_training_stream(books: Path, checkpoint: Path, cache: Path) -> None:
    record = json.loads((cache / "books.json").read_text())
    assert (record["training"], record["held_out"]) == (["one", "two"], ["kept"])
    tokenizer = network.load(str(checkpoint))[1]
    stream = corpus.open_stream(cache, "train")
    assert tokenizer.decode(stream.tolist()) == "".join(
        (books / f"{n}.txt").read_text() for n in ("one", "two")
    )
    assert stream.size == record["train_tokens"]


def test_a_batch_depends_on_seed_and_step_alone(cache: Path) -> None:
    stream = corpus.open_stream(cache, "train")
    batch = corpus.batch(stream, TINY, BOS, 5)
    assert np.array_equal(batch, corpus.batch(stream, TINY.replace(positions="rope", lr=1.0), BOS, 5))
    assert not np.array_equal(batch, corpus.batch(stream, TINY, BOS, 7))
    assert not np.array_equal(batch, corpus.batch(stream, TINY.replace(seed=1), BOS, 5))
    assert (batch[:, 0] == BOS).all()
    assert [corpus.batch(stream, TINY, BOS, step).shape for step in (0, 1)] == [(4, 16), (2, 32)]


def test_a_cache_of_other_books_or_another_tokenizer_is_refused(
    books: Path, checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    tokenizer = network.load(str(checkpoint))[1]
    with pytest.raises(ValueError, match="choose another --cache"):
        corpus.prepare(books, cache, ("one",), tokenizer)
    with pytest.raises(ValueError, match="choose another --cache"):
        corpus.prepare(books, cache, ("kept",), train_tokenizer([books / "one.txt"], 280))


def test_a_cache_of_the_pairs_recipe_is_refused(books: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The other cache's record names neither a vocabulary's digest nor a dtype."""
    pair_corpus.prepare(books, tmp_path, ("kept",), 300)
    with pytest.raises(ValueError, match=r"another tokenizer; choose another --cache"):
        corpus.prepare(books, tmp_path, ("kept",), network.load(str(checkpoint))[1])


def test_a_book_that_contains_bos_is_refused(books: Path, checkpoint: Path, tmp_path: Path) -> None:
    for path in books.glob("*.txt"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "one.txt").write_text("The <s> ship sailed.")
    with pytest.raises(ValueError, match="contain '<s>'"):
        corpus.prepare(tmp_path, tmp_path / "cache", ("kept",), network.load(str(checkpoint))[1])


# Recipe


def test_the_learning_rate_warms_up_holds_and_cools_down() -> None:
    rates = [TINY.lr_at(step) for step in range(13)]
    assert rates[:9] == pytest.approx([5e-3, *[1e-2] * 8])
    assert rates[9:] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0.0])


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    TINY.write(tmp_path / "recipe.json")
    assert RecalibrationRecipe.read(tmp_path / "recipe.json") == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "none"}, "use one of nope, rope"),
        ({"precision": "fp8"}, "use one of bf16, fp32"),
        ({"lengths": (48,)}, "divide batch_tokens=64"),
        ({"cooldown_tokens": 10_000}, "between 0 and tokens=768"),
    ],
)
def test_a_recipe_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change)


# Loss and network


def test_the_loss_and_its_gradient_are_cross_entropys() -> None:
    torch.manual_seed(0)
    n_positions = CHUNK + 40
    head = torch.randn(50, 8, dtype=torch.float64)
    tokens = torch.randint(0, 50, (2, n_positions))
    hidden = torch.randn(2, n_positions, 8, dtype=torch.float64, requires_grad=True)
    loss = next_token_loss(hidden, head, tokens)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    logits = hidden[:, :-1].flatten(0, 1) @ head.T
    expected = functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, hidden)[0], rtol=1e-9, atol=1e-12)


def test_a_loss_without_a_gradient_computes_none() -> None:
    torch.manual_seed(0)
    head, tokens = torch.randn(50, 8), torch.randint(0, 50, (2, CHUNK))
    hidden = torch.randn(2, CHUNK, 8, requires_grad=True)
    products = 2 * (CHUNK - 1) * 50 * 8
    with FlopCounterMode(display=False) as counted:
        trained = next_token_loss(hidden, head, tokens)
    assert counted.get_total_flops() == 2 * 2 * products
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        held_out = next_token_loss(hidden, head, tokens)
    assert counted.get_total_flops() == 2 * products
    assert torch.equal(held_out, trained.detach())


@pytest.mark.parametrize("name", ["smollm2-drope", "smollm2-rope"])
def test_a_model_with_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is smollm2 with an adapter.*recalibrate smollm2$"):
        network.load(name)


def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would fill it at random, and the adapter be trained on that."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors .*layers\.1\.mlp\.up_proj"):
        network.load(str(tmp_path))


def test_a_model_is_loaded_in_float32_with_fused_attention(checkpoint: Path) -> None:
    model, _ = network.load(str(checkpoint))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_the_first_adapter_changes_nothing_and_the_rest_is_frozen(checkpoint: Path) -> None:
    tokens = torch.tensor([[BOS, 5, 6, 7]])
    model, _ = network.load(str(checkpoint))
    with torch.no_grad():
        before = model(tokens).logits
    adapted = network.adapt(model, TINY.replace(positions="rope", norms=True))
    with torch.no_grad():
        assert torch.equal(adapted(tokens).logits, before)
    names = {name.split(".layers.")[-1] for name in network.trainable(adapted)}
    assert {name.split(".")[-2 if "layernorm" in name else -3] for name in names} >= {"lora_A", "lora_B"}
    assert any("input_layernorm" in name for name in names)
    assert not any("mlp" in name or "embed" in name for name in names)


def test_null_rotation_makes_attention_blind_to_order_and_keeps_the_factor(checkpoint: Path) -> None:
    model, _ = network.load(str(checkpoint))
    model.model.layers = model.model.layers[:1]
    tokens = torch.tensor([[BOS, 5, 6, 7, 8, 9], [BOS, 8, 5, 7, 6, 9]])
    network.null_rotation(model)
    with torch.no_grad():
        last = model(tokens, use_cache=False).logits[:, -1]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-5)
    model.model.rotary_emb.rotary.attention_scaling = 1.25
    cos, sin = model.model.rotary_emb(torch.zeros(1, 3, 8), torch.arange(3)[None])
    assert cos.unique().tolist() == [1.25]
    assert sin.unique().tolist() == [0.0]


def test_a_model_without_a_rotary_module_is_refused() -> None:
    from phaselens.testing import tiny_model

    class WithoutRotary(torch.nn.Module):
        model = tiny_model("gpt2").transformer

    with pytest.raises(ValueError, match=r"no model\.rotary_emb"):
        network.null_rotation(WithoutRotary())


# Runs


def test_step_0_is_the_model_just_after_nulling(
    start: Any, checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    run = start(tmp_path)
    run.run(stop_step=0)
    (row,) = rows(tmp_path)
    model, _ = network.load(str(checkpoint))
    network.null_rotation(model)
    windows = torch.from_numpy(corpus.held_out_windows(corpus.open_stream(cache, "held_out"), 4, 32, BOS))
    with torch.no_grad():
        assert row["loss"] == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-5)
    assert row["tokens"] == 0


def test_statistics_are_the_eager_models(start: Any, tmp_path: Path) -> None:
    run = start(tmp_path)
    texts = run.measure_texts
    run.adapted.eval()
    model = run.model
    with torch.no_grad():
        statistics = sinks_and_spike(model, run.head, texts)
        base = model(texts, labels=texts).loss
        states = torch.stack(model(texts, output_hidden_states=True).hidden_states)[:-1]
        write = statistics["write_layer"]
        mlp = model.model.layers[write].mlp
        original = mlp.forward
        keep = torch.ones(1, texts.shape[1], 1)
        keep[:, 0] = 0
        mlp.forward = lambda x: original(x) * keep
        ablated = model(texts, labels=texts).loss
    assert statistics["bos_mlp_ratio"] == pytest.approx(math.exp(ablated - base), rel=1e-4)
    assert statistics["bos_mlp_ratio"] != 1.0
    # hidden_states[1] is the residual after layer 0; that after the last layer is given only with the norm applied.
    assert statistics["bos_norm"] >= states[1][:, 0].norm(dim=-1).mean().item() - 1e-3
    assert 0 <= statistics["sink_rate"] <= 1
    assert 0 < statistics["entropy"] < math.log(32)


def test_training_lowers_the_held_out_loss_and_changes_the_adapter_alone(start: Any, tmp_path: Path) -> None:
    run = start(tmp_path)
    frozen = {
        name: parameter.clone()
        for name, parameter in run.adapted.named_parameters()
        if not parameter.requires_grad
    }
    run.run()
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0] - 0.1
    assert all(
        torch.equal(parameter, frozen[n]) for n, parameter in run.adapted.named_parameters() if n in frozen
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_never_stopped(start: Any, tmp_path: Path) -> None:
    uninterrupted = start(tmp_path / "whole")
    uninterrupted.run()
    killed = start(tmp_path / "killed")
    killed.run(stop_step=5)
    # Steps after the last checkpoint are lost in a kill; what was logged of them, half a line too, leaves no trace.
    for _ in range(2):
        killed.train_step()
    killed.log(0.0, 0.0)
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "los')
    (tmp_path / "killed" / CHECKPOINTS / "00000007.tmp").write_bytes(b"half")
    resumed = start(tmp_path / "killed")
    assert resumed.step == 5
    resumed.run()
    assert same(values(uninterrupted), values(resumed))
    measured = [
        {row["step"]: (row["loss"], row["lr"], row.get("bos_norm")) for row in rows(tmp_path / name)}
        for name in ("whole", "killed")
    ]
    assert set(measured[0]) == {0, 2, 4, 6, 8, 10, 12}
    assert measured[1].items() >= measured[0].items()
    assert {row["step"] for row in rows(tmp_path / "whole") if "sink_rate" in row} == {0, 6, 12}
    assert set(checkpoints(tmp_path / "whole")) == {0, 4, 8, 12}


def test_another_recipe_does_not_go_on_with_a_run(start: Any, tmp_path: Path) -> None:
    start(tmp_path).run(stop_step=2)
    with pytest.raises(ValueError, match="another recipe"):
        start(tmp_path, TINY.replace(lr=1e-3))
    start(tmp_path, TINY.replace(tokens=20 * 64))


@pytest.mark.slow
def test_a_run_can_be_ended_from_a_kept_checkpoint(start: Any, tmp_path: Path) -> None:
    long = TINY.replace(tokens=100 * 64)
    start(tmp_path / "long", long).run(stop_step=10)
    short = TINY.replace(tokens=8 * 64, cooldown_tokens=3 * 64)
    branch = start(tmp_path / "short", short, branch_from=tmp_path / "long")
    assert branch.step == 4
    branch.run()
    direct = start(tmp_path / "direct", short)
    direct.run()
    assert same(values(branch), values(direct))


def test_a_run_in_its_cooldown_is_not_extended_in_place(start: Any, tmp_path: Path) -> None:
    start(tmp_path).run(stop_step=11)
    with pytest.raises(ValueError, match="in its cooldown"):
        start(tmp_path, TINY.replace(tokens=20 * 64))
    longer = start(tmp_path / "longer", TINY.replace(tokens=20 * 64), branch_from=tmp_path)
    assert longer.step == 8


def test_a_run_can_start_from_the_adapter_of_another_recipe(start: Any, tmp_path: Path) -> None:
    first = start(tmp_path / "first")
    first.run(stop_step=4)
    checkpoint = checkpoints(tmp_path / "first")[4]
    other = TINY.replace(batch_tokens=128, lengths=(32,), lr=3e-3, seed=1)
    recipe = starting_from(other, checkpoint)
    second = start(tmp_path / "second", recipe, start_from=checkpoint)
    assert second.step == 0
    assert same(values(first), values(second))
    second.run(stop_step=2)
    written = rows(tmp_path / "second")
    assert [row["tokens"] for row in written] == [4 * 64, 4 * 64 + 128, 4 * 64 + 256]
    assert written[0]["loss"] == pytest.approx(rows(tmp_path / "first")[-1]["loss"], rel=1e-6)
    resumed = start(tmp_path / "second", recipe, start_from=checkpoint)
    assert resumed.step == 2
    assert same(values(second), values(resumed))
    with pytest.raises(ValueError, match="another recipe"):
        start(tmp_path / "second", other)


@pytest.mark.parametrize("change", [{"rank": 4}, {"positions": "rope"}, {"norms": True}])
def test_a_run_does_not_start_from_an_adapter_of_another_kind(
    start: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    start(tmp_path).run(stop_step=1)
    with pytest.raises(ValueError, match=f"trained with {next(iter(change))}"):
        starting_from(TINY.replace(**change), checkpoints(tmp_path)[1])


@pytest.mark.slow
@pytest.mark.parametrize("norms", [False, True])
def test_a_run_can_start_from_a_shipped_adapter(start: Any, tmp_path: Path, norms: bool) -> None:
    recipe = TINY.replace(norms=norms)
    first = start(tmp_path / "first", recipe)
    first.run()
    first.adapted.save_pretrained(tmp_path / "first" / "adapter")
    export(tmp_path / "first", tmp_path / "shipped")
    again = starting_from(recipe.replace(seed=1), tmp_path / "shipped")
    assert again.start_tokens == TINY.tokens
    second = start(tmp_path / "second", again, start_from=tmp_path / "shipped")
    rounded = {name: value.half().float() for name, value in values(first).items()}
    assert same(rounded, values(second))
    with pytest.raises(ValueError, match="trained with positions nope, not rope"):
        starting_from(recipe.replace(positions="rope"), tmp_path / "shipped")


def test_twins_differ_in_rotation_only(start: Any, checkpoint: Path, tmp_path: Path) -> None:
    rope, drope = (start(tmp_path / name, TINY.replace(positions=name)) for name in ("rope", "nope"))
    assert same(values(rope), values(drope))
    # With the rotation put back, the drope twin takes exactly the rope twin's steps.
    drope.model.model.rotary_emb = drope.model.model.rotary_emb.rotary
    rope.run(stop_step=4)
    drope.run(stop_step=4)
    assert same(values(rope), values(drope))


def test_bf16_follows_fp32(start: Any, tmp_path: Path) -> None:
    runs = [start(tmp_path / p, TINY.replace(precision=p)) for p in ("fp32", "bf16")]
    for run in runs:
        run.run(stop_step=6)
    exact, rounded = ([row["loss"] for row in rows(tmp_path / p)] for p in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert {parameter.dtype for parameter in runs[1].parameters.values()} == {torch.float32}


def test_the_command_makes_an_adapter_that_merges(books: Path, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from phaselens.lens.weight_adapters import apply_adapter

    out = tmp_path / "out"
    arguments = [str(checkpoint), "--corpus", str(books), "--held-out", "kept", "--out", str(out)]
    arguments += [
        "--rank",
        "2",
        "--batch-tokens",
        "64",
        "--lengths",
        "16",
        "32",
        "--tokens",
        "256",
        "--norms",
    ]
    arguments += ["--cooldown-tokens", "64", "--precision", "fp32", "--window", "32", "--loss-windows", "2"]
    arguments += ["--measure-windows", "2", "--warmup-steps", "1"]
    main([*arguments, "--stop-step", "2"])
    assert not (out / "adapter").exists()
    run = main(arguments)
    assert run.step == 4
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 32.0)
    model, tokenizer = network.load(str(checkpoint))
    network.null_rotation(model)
    apply_adapter(model, out / "adapter", "tiny")
    tokens = torch.tensor([tokenizer("The grey sea rose.").input_ids])
    run.adapted.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, run.adapted(tokens).logits, rtol=0, atol=1e-5)
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("input_layernorm.weight") for name in stored)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own internals
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler that inductor knows")
def test_compiled_layers_train_as_plain_ones(start: Any, tmp_path: Path) -> None:
    plain, compiled = start(tmp_path / "plain"), start(tmp_path / "compiled", compile_layers=True)
    for run in (plain, compiled):
        run.run(stop_step=3)
    for name, value in values(plain).items():
        torch.testing.assert_close(compiled.parameters[name].detach(), value, rtol=1e-3, atol=1e-4)
