"""Runs, tasks and patching under rotations that depend on a text's length: as a fresh model, given one text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phaselens
from phaselens.data import Text
from phaselens.patching import Experiment, prompt
from phaselens.testing import tiny_lens
from tests.lens.test_frequencies import BY_LENGTH, N_CTX, fresh
from tests.toys import letters, toy_tokenizer

METRICS = ["sinks", "bos-norm", "attention-patterns", "layer-ablation"]
# With BOS in front: below, at and above the trained length.
TEXTS = [Text(str(n), letters(n, n)) for n in (20, 2 * N_CTX, N_CTX - 1, N_CTX, 5, 50)]


def lens_of(rope_type: str) -> Any:
    return phaselens.load(fresh(rope_type), label="toy", tokenizer=toy_tokenizer(), check=False)


def rows_by_text(run: Any) -> dict[tuple[str, str, str], list[tuple[Any, ...]]]:
    """The rows of each text in every table that has texts, by metric, table and text."""
    rows: dict[tuple[str, str, str], list[tuple[Any, ...]]] = {}
    for metric, result in run.metrics.items():
        for name, table in result.tables.items():
            columns = [column.name for column in table.spec.columns]
            if "text" in columns:
                for row in table.rows:
                    rows.setdefault((metric, name, str(row[columns.index("text")])), []).append(row)
    return rows


def require_same(rows: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], what: Any) -> None:
    assert len(rows) == len(expected) > 0, what
    for row, other in zip(rows, expected, strict=True):
        for cell, same in zip(row, other, strict=True):
            close = isinstance(same, float) and cell == pytest.approx(same, rel=1e-5, abs=1e-5)
            assert cell == same or close, (what, row, other)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_a_run_gives_each_text_what_a_fresh_model_gives_it_alone(rope_type: str) -> None:
    alone: dict[Any, Any] = {}
    for text in TEXTS:
        alone |= rows_by_text(phaselens.run(lens_of(rope_type), metrics=METRICS, texts=[text]))
    lens = lens_of(rope_type)
    for texts, batch_tokens in ((TEXTS, 10_000), (TEXTS[::-1], 100), (TEXTS, 1)):
        together = rows_by_text(phaselens.run(lens, metrics=METRICS, texts=texts, batch_tokens=batch_tokens))
        assert together.keys() == alone.keys()
        for key, rows in together.items():
            require_same(rows, alone[key], (key, batch_tokens))


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_passkeys_at_the_trained_length_do_not_depend_on_longer_ones(rope_type: str) -> None:
    lens = tiny_lens(**lens_options(rope_type))

    def answers(lengths: str) -> list[tuple[Any, ...]]:
        settings = {"symbols": "abcdef", "lengths": lengths, "depths": "0.5", "n": 2}
        run = phaselens.run(lens, metrics={"passkey": settings}, n_texts=2, max_tokens=N_CTX)
        table = run.metrics["passkey"].tables["prompts"]
        name = [column.name for column in table.spec.columns].index("prompt")
        return [row for row in table.rows if str(row[name]).startswith("260/")]

    require_same(answers("260, 400"), answers("260"), rope_type)


def lens_options(rope_type: str) -> dict[str, Any]:
    """A tiny model whose trained length is that of the shortest passkey."""
    from tests.lens.test_frequencies import ROPE_TYPES

    parameters = {"rope_theta": 1e4} | ROPE_TYPES[rope_type]
    if rope_type == "longrope":
        parameters["original_max_position_embeddings"] = 260
    n_ctx = 260 if rope_type == "dynamic" else 1040
    return {"max_position_embeddings": n_ctx, "rope_parameters": parameters, "dtype": torch.float64}


@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_a_sweep_after_a_longer_text_is_that_of_a_fresh_model(rope_type: str) -> None:
    def sweep(lens: Any) -> Any:
        clean, corrupt = (prompt(lens, letters(N_CTX - 1, start)) for start in (0, 1))
        return Experiment(clean, corrupt).sweep("resid").values.data

    lens = lens_of(rope_type)
    lens.stream(torch.zeros((1, 2 * N_CTX), dtype=torch.long))
    assert sweep(lens) == pytest.approx(sweep(lens_of(rope_type)), abs=1e-9)
