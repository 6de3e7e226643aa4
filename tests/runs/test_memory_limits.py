"""Memory that runs out: the batch is halved once, the run goes on with the same results, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.lens import token_losses
from phaselens.runs.memory_limits import fitting_batch_tokens, halved
from phaselens.runs.shards import Shard
from tests.toys import letters, toy_lens

TEXTS = [letters(7 + index % 3, index) for index in range(8)]
METRICS = ["sinks", "bos-mlp"]


def limited_lens(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A lens whose device has memory for batches of up to `n_tokens` tokens."""
    lens = toy_lens()
    embed = lens.original_model.get_input_embeddings()

    def hook(module: Any, arguments: Any) -> None:
        if arguments[0].numel() > n_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    embed.register_forward_pre_hook(hook)
    return lens


def values(run: phaselens.Run, metric: str) -> Any:
    return [[cell for cell in row if isinstance(cell, float)] for row in run.rows(metric, "texts").rows]


@pytest.mark.slow
@pytest.mark.parametrize("shard_tokens", [20, 65_536])
@pytest.mark.parametrize("keeps", [False, True])
def test_the_run_goes_on_with_smaller_batches(
    shard_tokens: int, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"metrics": METRICS, "texts": TEXTS, "shard_tokens": shard_tokens}
    expected = phaselens.run(toy_lens(), **options)
    options["out"] = tmp_path / "run" if keeps else None
    largest = 20 if shard_tokens == 20 else 80
    run = phaselens.run(limited_lens(largest // 2 + 4, monkeypatch), **options)
    assert run.failed == []
    for metric in METRICS:
        np.testing.assert_allclose(
            np.array(values(run, metric), float),
            np.array(values(expected, metric), float),
            rtol=1e-4,
            atol=1e-6,
        )
    notes = [warning for warning in run.warnings if "memory ran out" in warning]
    assert notes
    assert all(note.startswith("llama") and "read in batches of half the size" in note for note in notes)
    if keeps:
        assert [w for w in phaselens.open_run(tmp_path / "run").warnings if "memory ran out" in w] == notes


@pytest.mark.slow
@pytest.mark.parametrize("shard_tokens", [40, 65_536])
@pytest.mark.parametrize("call", [1, 3])
def test_conditions_begin_anew_after_a_part_was_recorded(
    shard_tokens: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"metrics": METRICS, "texts": TEXTS, "shard_tokens": shard_tokens}
    expected = phaselens.run(toy_lens(), **options)
    losses, n_calls = token_losses.token_losses, 0

    def limited(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(*arguments)

    monkeypatch.setattr(token_losses, "token_losses", limited)
    run = phaselens.run(toy_lens(), **options)
    assert run.failed == []
    assert len(run.rows("bos-mlp", "texts").rows) == len(expected.rows("bos-mlp", "texts").rows)
    np.testing.assert_allclose(
        np.array(values(run, "bos-mlp"), float),
        np.array(values(expected, "bos-mlp"), float),
        rtol=1e-4,
        atol=1e-6,
    )
    (note,) = [warning for warning in run.warnings if "memory ran out" in warning]
    assert note.startswith("llama, conditions: memory ran out; ")


@pytest.mark.slow
def test_what_does_not_fit_in_half_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"does not fit into the memory of cpu; lower --batch-tokens"):
        phaselens.run(limited_lens(10, monkeypatch), metrics=METRICS, texts=TEXTS)
    with pytest.raises(InputError, match=r"a batch of 1 × 8 tokens does not fit"):
        phaselens.run(limited_lens(4, monkeypatch), metrics=METRICS, texts=TEXTS[:1])


def test_halves_hold_the_same_texts_in_order() -> None:
    shard = Shard(3, (5, 1, 2, 7), ((5, 1, 2), (7,)), 40)
    assert halved(shard) == Shard(3, (5, 1, 2, 7), ((5, 1), (2,), (7,)), 40)


@pytest.mark.slow
def test_automatic_batches_are_recorded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = toy_lens()
    n_tokens = fitting_batch_tokens(lens)
    assert 512 <= n_tokens <= 8192
    assert n_tokens & (n_tokens - 1) == 0
    options: dict[str, Any] = {"metrics": "sinks", "texts": TEXTS, "out": tmp_path / "run"}
    run = phaselens.run(lens, batch_tokens="auto", **options)
    assert run.options["batch_tokens"] == n_tokens
    assert run.warnings[0] == f"batches of {n_tokens:,} tokens, by free memory (--batch-tokens auto)"
    monkeypatch.setattr("phaselens.lens.memory.free_memory", lambda device: 0)
    assert fitting_batch_tokens(lens) == 512
    assert phaselens.run(lens, batch_tokens="auto", **options).to_dict() == run.to_dict()
    with pytest.raises(InputError, match="batch_tokens is 'many'"):
        phaselens.run(lens, batch_tokens="many", metrics="sinks", texts=TEXTS)
