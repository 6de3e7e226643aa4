"""Runs, tasks and patching under length-dependent rotations give the values of a fresh model on one text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phaselens
from phaselens.data import Text
from phaselens.patching import Experiment, prompt
from phaselens.testing import tiny_lens
from tests.lens.test_frequencies import BY_LENGTH, N_CTX, ROPE_TYPES, fresh
from tests.marks import mark_later_slow
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


def require_same(rows: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], subject: Any) -> None:
    assert len(rows) == len(expected) > 0, subject
    for row, expected_row in zip(rows, expected, strict=True):
        for cell, expected_cell in zip(row, expected_row, strict=True):
            close = isinstance(expected_cell, float) and cell == pytest.approx(
                expected_cell, rel=1e-5, abs=1e-5
            )
            assert cell == expected_cell or close, (subject, row, expected_row)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_a_run_gives_each_text_the_values_of_a_fresh_model(rope_type: str) -> None:
    separate: dict[Any, Any] = {}
    for text in TEXTS:
        separate |= rows_by_text(phaselens.run(lens_of(rope_type), metrics=METRICS, texts=[text]))
    lens = lens_of(rope_type)
    for texts, batch_tokens in ((TEXTS, 10_000), (TEXTS[::-1], 100), (TEXTS, 1)):
        combined = rows_by_text(phaselens.run(lens, metrics=METRICS, texts=texts, batch_tokens=batch_tokens))
        assert combined.keys() == separate.keys()
        for key, rows in combined.items():
            require_same(rows, separate[key], (key, batch_tokens))


@functools.cache
def alone(rope_type: str, n_tokens: int) -> dict[tuple[str, str, str], list[tuple[Any, ...]]]:
    """The rows of a text of `n` tokens from a fresh model."""
    return rows_by_text(phaselens.run(lens_of(rope_type), metrics="sinks", texts=[text_of(n_tokens)]))


def text_of(n_tokens: int) -> Text:
    return Text(str(n_tokens), letters(n_tokens - 1, n_tokens))


N_TOKENS = st.integers(2, 2 * N_CTX) | st.sampled_from([N_CTX - 1, N_CTX, N_CTX + 1])


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(N_TOKENS, min_size=2, max_size=5, unique=True),
    batch_tokens=st.integers(1, 6 * N_CTX),
)
def test_a_run_of_any_lengths_in_any_order_and_batch(
    rope_type: str, lengths: list[int], batch_tokens: int
) -> None:
    combined = rows_by_text(
        phaselens.run(
            shared_lens(rope_type),
            metrics="sinks",
            texts=[text_of(n_tokens) for n_tokens in lengths],
            batch_tokens=batch_tokens,
        )
    )
    expected = {key: rows for n_tokens in lengths for key, rows in alone(rope_type, n_tokens).items()}
    assert combined.keys() == expected.keys()
    for key, rows in combined.items():
        require_same(rows, expected[key], (key, lengths, batch_tokens))


@functools.cache
def shared_lens(rope_type: str) -> Any:
    """One lens for all runs of a test, so that state left by one run affects the next."""
    return lens_of(rope_type)


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
    parameters = {"rope_theta": 1e4} | ROPE_TYPES[rope_type]
    if rope_type == "longrope":
        parameters["original_max_position_embeddings"] = 260
    n_ctx = 260 if rope_type == "dynamic" else 1040
    return {"max_position_embeddings": n_ctx, "rope_parameters": parameters, "dtype": torch.float64}


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_questions_batched_with_longer_ones_are_answered_as_alone(rope_type: str, tmp_path: Path) -> None:
    """Below the trained length, with one option that reaches beyond it, and beyond it."""

    def item(n_words: int, *options: str) -> dict[str, Any]:
        return {
            "id": str(n_words),
            "kind": "parametric",
            "prompt": letters(n_words, n_words),
            "options": options,
            "answer": 0,
        }

    items = [item(50, "b", "c d"), item(20, "b", "c d"), item(N_CTX - 3, "b", "c d e f")]

    def answers(lens: Any, name: str, chosen: list[dict[str, Any]], **options: Any) -> dict[str, list[Any]]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in chosen))
        settings = {"file": str(file), "conditions": "bos-v seeds=1"}
        run = phaselens.run(lens, metrics={"knowledge": settings}, texts=[TEXTS[0]], **options)
        rows: dict[str, list[Any]] = {}
        for table in ("items", "texts"):
            for record in run.rows("knowledge", table).records():
                question = record["item"] if table == "items" else str(record["text"]).split("/")[0]
                rows.setdefault(str(question), []).append(tuple(record.values()))
        return rows

    lens = lens_of(rope_type)
    expected = {
        name: rows
        for question in items
        for name, rows in answers(lens_of(rope_type), question["id"], [question]).items()
    }
    assert expected.keys() == {"50", "20", str(N_CTX - 3)}
    for order, batch_tokens in ((items, 10_000), (items[::-1], 1)):
        combined = answers(lens, f"all-{batch_tokens}", order, batch_tokens=batch_tokens)
        assert combined.keys() == expected.keys()
        for name, rows in combined.items():
            require_same(rows, expected[name], (name, batch_tokens))


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", BY_LENGTH)
def test_a_sweep_after_a_longer_text_is_that_of_a_fresh_model(rope_type: str) -> None:
    def sweep(lens: Any) -> Any:
        clean, corrupt = (prompt(lens, letters(N_CTX - 1, start)) for start in (0, 1))
        return Experiment(clean, corrupt).sweep("resid").values.data

    lens = lens_of(rope_type)
    lens.stream(torch.zeros((1, 2 * N_CTX), dtype=torch.long))
    assert sweep(lens) == pytest.approx(sweep(lens_of(rope_type)), abs=1e-9)


def prompts(lens: Any, n_tokens: int) -> list[Any]:
    return [prompt(lens, letters(n_tokens - 1, start)) for start in (0, 1)]


def edited_experiment(lens: Any, n_tokens: int) -> Experiment:
    experiment = Experiment(*prompts(lens, n_tokens))
    experiment.condition("bos-v", layer=1)
    experiment.patch("blocks.1.hook_mlp_out", pos=[3, -1])
    return experiment


def patching_results(experiment: Experiment) -> dict[str, torch.Tensor]:
    """The results of all patching verbs."""
    numbers = {
        "sweep": experiment.sweep("resid").values.data,
        "attribution": experiment.attribution("head").values.data,
        "values": experiment.values(),
        "sinks": experiment.measure("sinks").rows,
    }
    return {verb: torch.tensor(values, dtype=torch.float64) for verb, values in numbers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", mark_later_slow(BY_LENGTH))
def test_patching_after_longer_texts_and_prompts_is_that_of_a_fresh_model(rope_type: str) -> None:
    lens = lens_of(rope_type)
    lens.stream(torch.zeros((1, 70), dtype=torch.long))
    experiment = edited_experiment(lens, N_CTX - 1)
    for n_tokens in (N_CTX - 1, 50, N_CTX):
        experiment.prompts(*prompts(lens, n_tokens))
        torch.testing.assert_close(
            patching_results(experiment),
            patching_results(edited_experiment(lens_of(rope_type), n_tokens)),
            atol=1e-9,
            rtol=0,
        )
