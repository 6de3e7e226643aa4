"""The recipe of the bundled pair, run small: seconds, on books made up here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.train_pair import batches, corpus
from tools.train_pair.__main__ import main
from tools.train_pair.measure import bos_ratio, matrix_entropy, measure
from tools.train_pair.model import build, null_rotation
from tools.train_pair.recipe import PairRecipe
from tools.train_pair.train import PairTraining

from tests.tools.books import same, write_books

TINY = PairRecipe(
    vocab_size=300,
    n_layers=2,
    n_heads=2,
    d_model=16,
    d_mlp=24,
    max_positions=32,
    batch_tokens=128,
    lengths=(16, 32),
    copy_depth=3,
    lr=1e-2,
    warmup_steps=4,
    trunk_tokens=10 * 128,
    twin_tokens=8 * 128,
    decay_tokens=4 * 128,
    log_tokens=4 * 128,
    checkpoint_tokens=3 * 128,
    snapshot_tokens=5 * 128,
)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [
        "the",
        "ship",
        "sailed",
        "north",
        "and",
        "a",
        "grey",
        "sea",
        "rose",
        "to",
        "meet",
        "her",
        "captain",
    ]
    return write_books(tmp_path_factory.mktemp("books"), words, n_lines=400)


@pytest.fixture(scope="module")
def cache(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    corpus.prepare(books, folder, ("kept",), TINY.vocab_size)
    return folder


def weights(run: PairTraining) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def test_tokenizer_puts_bos_first_and_round_trips(cache: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    text = "The ship sailed north.\nA 'grey' sea -- é!"
    ids = tokenizer(text).input_ids
    assert ids[0] == corpus.BOS_ID == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids(corpus.MARK) == corpus.MARK_ID
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= TINY.vocab_size


def test_held_out_books_are_not_in_the_training_stream(cache: Path, books: Path) -> None:
    record = json.loads((cache / "books.json").read_text())
    assert record["training"] == ["one", "two"]
    assert record["held_out"] == ["kept"]
    stream = corpus.open_stream(cache, "train")
    assert stream.size == record["train_tokens"]
    assert stream.min() >= len(corpus.SPECIAL)


def test_a_missing_held_out_book_is_refused(books: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dracula"):
        corpus.prepare(books, tmp_path / "cache", ("dracula",), 300)


def test_a_cache_of_other_books_is_refused(books: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose another"):
        corpus.prepare(books, cache, ("one",), TINY.vocab_size)
    (tmp_path / "books.json").write_text(
        '{"training": ["one", "two"], "held_out": ["kept"], "dtype": "uint16"}'
    )
    with pytest.raises(ValueError, match="another vocabulary; choose another --cache"):
        corpus.prepare(books, tmp_path, ("kept",), TINY.vocab_size)


def test_copies_are_what_the_marks_promise() -> None:
    source = np.arange(10, 110, dtype=np.uint16)
    out = batches.with_copies(source, 0.3, 3, np.random.default_rng(1)).tolist()
    remaining: list[int] = []
    position = 0
    copies = set()
    while position < len(out):
        if out[position] != corpus.MARK_ID:
            remaining.append(out[position])
            position += 1
            continue
        marks = 0
        while out[position] == corpus.MARK_ID:
            marks, position = marks + 1, position + 1
        assert out[position] == remaining[-marks]
        copies.add(marks)
        position += 1
    assert remaining == source.tolist()
    assert copies == {1, 2, 3}


def test_no_copies_at_rate_zero() -> None:
    source = np.arange(10, 50, dtype=np.uint16)
    assert batches.with_copies(source, 0.0, 1, np.random.default_rng(0)).tolist() == source.tolist()


def test_a_batch_depends_on_seed_and_step_alone(cache: Path) -> None:
    stream = corpus.open_stream(cache, "train")
    first, same_step = batches.batch(stream, TINY, 5), batches.batch(stream, TINY, 5)
    assert np.array_equal(first, same_step)
    assert not np.array_equal(first, batches.batch(stream, TINY, 7))
    assert not np.array_equal(first, batches.batch(stream, TINY.replace(seed=1), 5))
    assert (first[:, 0] == corpus.BOS_ID).all()
    assert {batches.batch(stream, TINY, step).shape for step in range(4)} == {(8, 16), (4, 32)}


def test_matrix_entropy_of_known_matrices() -> None:
    orthogonal = torch.eye(6, 8)
    rank_one = torch.outer(torch.arange(1.0, 7.0), torch.ones(8))
    values = matrix_entropy(torch.stack([orthogonal, rank_one]))
    assert values[0].item() == pytest.approx(np.log(6), abs=1e-12)
    assert values[1].item() == pytest.approx(0.0, abs=1e-9)


def test_bos_ratio_is_against_the_median() -> None:
    residual = torch.zeros(1, 6, 4)
    residual[0, :, 0] = torch.tensor([10.0, 1, 2, 2, 2, 500])
    assert bos_ratio(residual).item() == pytest.approx(5.0)


def test_measure_agrees_with_the_model_and_leaves_it_as_it_was(cache: Path) -> None:
    model = build(TINY).train()
    texts = torch.from_numpy(corpus.held_out_windows(corpus.open_stream(cache, "held_out"), 5, 32))
    row = measure(model, texts, batch_size=2)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(texts, labels=texts, use_cache=False).loss.item()
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    # An untrained model attends almost uniformly: 1/(i+1) for query i, on average over queries 1..31.
    uniform = np.mean([1 / (i + 1) for i in range(1, 32)])
    assert np.allclose(row["sink"], uniform, atol=0.01)


def test_null_rotation_makes_attention_blind_to_order() -> None:
    one_layer = TINY.replace(n_layers=1)
    tokens = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 8, 5, 7, 6, 9]])
    model = build(one_layer).eval()
    with torch.no_grad():
        with_rotation = model(tokens, use_cache=False).logits[:, -1].double()
        null_rotation(model)
        nulled = model(tokens, use_cache=False).logits[:, -1].double()
    assert not torch.allclose(with_rotation[0], with_rotation[1], atol=1e-7, rtol=0)
    assert torch.allclose(nulled[0], nulled[1], atol=1e-7, rtol=0)


def test_schedules() -> None:
    assert TINY.trunk_lr(0) == pytest.approx(TINY.lr / 4)
    assert TINY.trunk_lr(3) == TINY.trunk_lr(1000) == TINY.lr
    rates = [TINY.twin_lr(128 * step) for step in range(9)]
    assert rates[:5] == [TINY.lr] * 5
    assert rates[8] == pytest.approx(0.1 * TINY.lr)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_batches_can_shrink_on_the_way(cache: Path, tmp_path: Path) -> None:
    recipe = TINY.replace(late_batch_tokens=32, late_from_step=3, trunk_tokens=3 * 128 + 5 * 32)
    assert [recipe.tokens_at(step) for step in (0, 2, 3, 4, 8)] == [0, 256, 384, 416, 544]
    stream = corpus.open_stream(cache, "train")
    assert [batches.batch(stream, recipe, step).size for step in (2, 3, 4)] == [128, 32, 32]
    assert np.array_equal(batches.batch(stream, recipe, 2), batches.batch(stream, TINY, 2))
    recipe = recipe.replace(late_weight_decay=0.7)
    assert [recipe.weight_decay_at(step) for step in (2, 3)] == [0.1, 0.7]
    run = PairTraining(recipe, "trunk", tmp_path, cache)
    run.run()
    assert run.step == 8
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.7, 0.0]
    assert run.log(None)["tokens"] == recipe.trunk_tokens


def test_a_recipe_survives_its_file_and_refuses_nonsense(tmp_path: Path) -> None:
    TINY.write(tmp_path / "recipe.json")
    assert PairRecipe.read(tmp_path / "recipe.json") == TINY
    with pytest.raises(ValueError, match="n_layer"):
        PairRecipe.from_dict({"n_layer": 3})
    with pytest.raises(ValueError, match="must divide"):
        TINY.replace(lengths=(48,))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_never_stopped(cache: Path, tmp_path: Path) -> None:
    uninterrupted = PairTraining(TINY, "trunk", tmp_path / "whole", cache)
    uninterrupted.run()
    killed = PairTraining(TINY, "trunk", tmp_path / "killed", cache)
    killed.run(stop_step=6)
    # Steps after the last checkpoint are lost in a kill: what was logged of them, half a line too, leaves no trace.
    for _ in range(2):
        killed.train_step()
    killed.log(0.0)
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"phase": "trunk", "step": 9, "los')
    resumed = PairTraining(TINY, "trunk", tmp_path / "killed", cache)
    assert resumed.step == 6
    resumed.run()
    assert same(weights(uninterrupted), weights(resumed))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    measured = [{row["step"]: (row["loss"], row["sink"], row["lr"]) for row in log} for log in rows]
    assert set(measured[0]) == {0, 1, 2, 4, 8, 10}
    assert measured[1].items() >= measured[0].items()


@pytest.mark.slow
def test_twins_share_the_trunk_and_differ_in_rotation_only(cache: Path, tmp_path: Path) -> None:
    trunk = PairTraining(TINY, "trunk", tmp_path / "trunk", cache)
    trunk.run()
    rope, drope = (
        PairTraining(TINY, twin, tmp_path / twin, cache, tmp_path / "trunk") for twin in ("rope", "drope")
    )
    assert same(weights(rope), weights(trunk))
    assert same(weights(drope), weights(trunk))
    moments = [run.optimizer.state_dict()["state"][0]["exp_avg"] for run in (trunk, rope, drope)]
    assert torch.equal(moments[0], moments[1])
    assert torch.equal(moments[0], moments[2])
    assert rope.step == drope.step == 10
    # With the rotation put back, the drope twin takes exactly the rope twin's steps.
    drope.model.model.rotary_emb = build(TINY).model.rotary_emb
    rope.run()
    drope.run()
    assert rope.step == drope.step == 18
    assert same(weights(rope), weights(drope))


def test_a_twin_needs_a_trunk(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trunk"):
        PairTraining(TINY, "drope", tmp_path / "drope", cache)


def test_training_learns(cache: Path, tmp_path: Path) -> None:
    run = PairTraining(TINY, "trunk", tmp_path, cache)
    before = run.log(None)["loss"]
    for _ in range(30):
        run.train_step()
    assert run.log(None)["loss"] < before - 1


@pytest.mark.slow
def test_the_whole_recipe_from_books_to_folders(books: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    TINY.replace(trunk_tokens=4 * 128, twin_tokens=3 * 128, decay_tokens=128).write(tmp_path / "tiny.json")
    out = tmp_path / "out"
    main(
        [
            "--corpus",
            str(books),
            "--out",
            str(out),
            "--recipe",
            str(tmp_path / "tiny.json"),
            "--held-out",
            "kept",
        ]
    )
    facts = json.loads((out / "export" / "pair.json").read_text())
    for twin, kind in (("rope", "llama"), ("drope", "llama_drope")):
        folder = out / "export" / twin
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == kind
        assert config.get("attention_type") == ("nope" if twin == "drope" else None)
        assert "softmax_scale" not in config
        with safe_open(folder / "model.safetensors", "pt") as stored:
            assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(folder)("The grey sea rose.", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()
        assert ids[0, 0] == 0
        assert facts[twin]["trained_tokens"] == 7 * 128
        assert facts[twin]["branch_tokens"] == 4 * 128
        card = (folder / "README.md").read_text()
        for part in (
            "license: mit",
            "held-out loss",
            "## Use",
            "Not for",
            "## Licence",
            f"{facts[twin]['loss']:.4f}",
        ):
            assert part in card
    snapshots = sorted(path.name for path in (out / "trunk" / "snapshots").iterdir())
    assert snapshots == ["0000000000.safetensors", "0000000512.safetensors"]
