"""Columns on attention, in layers with windows and sink logits, against dense float64 attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import phaselens
from phaselens.runs import Run
from phaselens.testing import tiny_model
from tests.toys import letters, toy_tokenizer

#: Texts shorter than the windows, as long as them, and longer.
TEXTS = [letters(3), letters(6, 2), letters(24, 3), letters(15, 11)]
WIDTH, DISTANCES = 5, 24


def exaone4() -> Any:
    """Return a model whose full layers have a `sliding_window` and ignore it."""
    config = transformers.Exaone4Config(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
        pad_token_id=None, sliding_window=7, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.data.mul_(8.0)
    return model.double().eval()


def unused_window() -> Any:
    """Return a model whose configuration has a `sliding_window` that the family does not read."""
    model = tiny_model("llama", dtype=torch.float64)
    model.config.sliding_window = 7
    return model


def strong_sink_logits() -> Any:
    """Return a model whose sink logits take nearly all attention in one head and little in another."""
    model = tiny_model("gpt-oss", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.copy_(torch.tensor([12.0, 2.0, -2.0, 0.0]))
    return model


MODELS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    "mistral": (lambda: tiny_model("mistral", dtype=torch.float64), (7, 7)),
    "gemma2": (lambda: tiny_model("gemma2", dtype=torch.float64), (7, None)),
    "window of 2": (lambda: tiny_model("mistral", dtype=torch.float64, sliding_window=2), (2, 2)),
    "gpt-oss": (lambda: tiny_model("gpt-oss", dtype=torch.float64), (7, None)),
    "gpt-oss, strong sink logits": (strong_sink_logits, (7, None)),
    "exaone4": (exaone4, (7, None)),
    "llama, unused window": (unused_window, (None, None)),
}


class ModelRun:
    """A run, and each text's eager patterns [layer, head, query, key]."""

    def __init__(self, name: str) -> None:
        build, self.windows = MODELS[name]
        model = build()
        tokenizer = toy_tokenizer()
        model.set_attn_implementation("eager")
        self.patterns = []
        for text in TEXTS:
            with torch.no_grad():
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                output = model(ids, output_attentions=True, use_cache=False)
            self.patterns.append(
                torch.stack([layer_attention[0] for layer_attention in output.attentions]).double().numpy()
            )
        self.lens = phaselens.load(model, label="made", tokenizer=tokenizer)
        assert self.lens.info.windows == self.windows
        self.run = phaselens.run(
            self.lens,
            metrics=[("attention-patterns", {"local_width": WIDTH, "distances": DISTANCES}), "sinks", "bos-write"],
            texts=TEXTS, batch_tokens=64,
        )  # fmt: skip
        assert not self.run.failed, [
            layer_attention for name in self.run.failed for layer_attention in self.run.metrics[name].failures
        ]

    def rows(self, metric: str, table: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = self.run.rows(metric, table).records()
        return records

    def pattern(self, row: dict[str, Any]) -> np.ndarray:
        """Return the pattern of the row's head, [query, key]."""
        pattern: np.ndarray = self.patterns[int(row["text"])][row["layer"], row["head"]]
        return pattern

    def visible(self, layer: int, n: int) -> np.ndarray:
        """Return whether a query of the layer sees a key, bool [query, key]."""
        distance = np.arange(n)[:, None] - np.arange(n)
        return (distance >= 0) & (distance < (self.windows[layer] or n))


@pytest.fixture(scope="module", params=MODELS)
def model_run(request: pytest.FixtureRequest) -> ModelRun:
    return ModelRun(request.param)


def is_close(value: float | None, expected: float) -> bool:
    """Return whether the cell agrees with the expected number; NaN means that it is missing."""
    if np.isnan(expected):
        return value is None
    return value is not None and bool(np.isclose(value, expected, rtol=1e-6, atol=1e-7))


def entropies(pattern: np.ndarray) -> np.ndarray:
    logs = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
    entropy: np.ndarray = -(pattern * logs).sum(-1)
    return entropy


def patterns_of(p: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """Return the values of `attention-patterns` for one head p [query, key], by their definitions."""
    n = len(p)
    n_keys = visible.sum(-1)
    received = p.sum(0) / n
    distance = np.arange(n)[:, None] - np.arange(n)
    is_near = (distance > 0) & (distance <= WIDTH)
    sees_bos = visible[:, 0] & (np.arange(n) > 0)
    return {
        "entropy": entropies(p).mean(),
        "entropy_normalised": (entropies(p)[n_keys > 1] / np.log(n_keys[n_keys > 1])).mean(),
        "concentration": 1 - entropies(received) / np.log(n),
        "sink": p[sees_bos, 0].mean(),
        "local": (p * (is_near & (np.arange(n) > 0)))[1:].sum(-1).mean(),
        "itself": p.diagonal()[1:].mean(),
        "local_with_bos": (p * is_near)[1:].sum(-1).mean(),
    }


@pytest.mark.slow
def test_every_column_of_attention_patterns_and_its_null(model_run: ModelRun) -> None:
    for row in model_run.rows("attention-patterns", "texts"):
        p = model_run.pattern(row)
        visible = model_run.visible(row["layer"], len(p))
        uniform = visible / visible.sum(-1, keepdims=True)
        for name, expected in patterns_of(p, visible).items():
            assert is_close(row[name], expected), (name, row[name], expected)
        for name, expected in patterns_of(uniform, visible).items():
            null = "null" if name == "entropy" else f"{name}_null"
            assert is_close(row[null], expected), (null, row[null], expected)
        assert row["itself"] >= 0
        assert 0 <= row["concentration"] <= 1 + 1e-7


@pytest.mark.slow
def test_attention_by_distance_is_a_mean_over_the_pairs_that_are_seen(model_run: ModelRun) -> None:
    for row in model_run.rows("attention-patterns", "profile"):
        layer, distance = row["layer"], row["distance"]
        values, nulls = [], []
        for patterns in model_run.patterns:
            n = patterns.shape[-1]
            if distance >= n or distance >= (model_run.windows[layer] or n):
                continue
            visible = model_run.visible(layer, n)
            uniform = visible / visible.sum(-1, keepdims=True)
            values.append(patterns[layer].diagonal(-distance, axis1=-2, axis2=-1).mean())
            nulls.append(uniform.diagonal(-distance).mean())
        assert row["n_texts"] == len(values)
        assert is_close(row["attention"], np.mean(values) if values else np.nan), row
        assert is_close(row["null"], np.mean(nulls) if nulls else np.nan), row


def test_every_column_of_sinks_and_its_null(model_run: ModelRun) -> None:
    for row in model_run.rows("sinks", "texts"):
        p = model_run.pattern(row)
        visible = model_run.visible(row["layer"], len(p))
        uniform = visible / visible.sum(-1, keepdims=True)
        for name, matrix in (("score", p), ("null", uniform)):
            all_name = "score_all" if name == "score" else "null_all"
            assert is_close(row[all_name], matrix[visible[:, 0], 0].mean())
            assert is_close(row[name], matrix[1:][visible[1:, 0], 0].mean())


def test_the_strongest_key_has_the_largest_mean_over_the_queries_that_see_it(model_run: ModelRun) -> None:
    for row in model_run.rows("sinks", "strongest"):
        p = model_run.pattern(row)
        visible = model_run.visible(row["layer"], len(p))
        scores = p.sum(0) / visible.sum(0)
        n_queries = visible.sum(0)
        has_enough = n_queries >= min(8, (n_queries[1] + 1) // 2)
        strongest_key = 1 + int(np.where(has_enough, scores, -1)[1:].argmax())
        assert row["position"] == strongest_key
        assert is_close(row["score"], scores[strongest_key])
        uniform = visible / visible.sum(-1, keepdims=True)
        assert is_close(row["null"], uniform[visible[:, strongest_key], strongest_key].mean())


def test_every_column_of_bos_write_and_its_null(model_run: ModelRun) -> None:
    lens = model_run.lens
    activations: list[dict[str, np.ndarray]] = []
    for text in TEXTS:
        recorded: dict[str, np.ndarray] = {}

        def recorder(name: str, recorded: dict[str, np.ndarray] = recorded) -> Any:
            return lambda tensor, hook: recorded.__setitem__(name, tensor[0].double().numpy())

        names = [f"blocks.{layer}.attn.hook_{point}" for layer in (0, 1) for point in ("v", "z", "out")]
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        lens.stream(ids, [(name, recorder(name)) for name in names])
        activations.append(recorded)
    norm = np.linalg.norm
    by_layer: dict[tuple[str, int], tuple[np.ndarray, float, float]] = {}
    for row in model_run.rows("bos-write", "texts"):
        p, layer, head = model_run.pattern(row), row["layer"], row["head"]
        visible = model_run.visible(layer, len(p))
        sees_bos = visible[:, 0] & (np.arange(len(p)) > 0)
        v, z, attn_out = (
            activations[int(row["text"])][f"blocks.{layer}.attn.hook_{point}"] for point in ("v", "z", "out")
        )
        n_heads = lens.info.n_heads
        z, v = z.reshape(len(p), n_heads, -1), v.reshape(len(p), lens.info.n_kv_heads, -1)
        group = n_heads // v.shape[1]
        w_o = lens.blocks[layer].attn.W_O.detach().double().numpy().reshape(n_heads, z.shape[-1], -1)
        uniform = (visible / visible.sum(-1, keepdims=True))[sees_bos, 0].mean()
        bos_value = v[0, head // group]
        write_norm = norm(bos_value @ w_o[head])
        head_output = norm(z[sees_bos, head] @ w_o[head], axis=-1).mean()
        expected = {
            "attn": p[sees_bos, 0].mean(), "attn_null": uniform, "value_norm": norm(bos_value),
            "value_norm_null": norm(v[1:, head // group], axis=-1).mean(),
            "write": p[sees_bos, 0].mean() * norm(bos_value), "null": uniform * norm(bos_value),
            "true_write": p[sees_bos, 0].mean() * write_norm, "true_write_null": uniform * write_norm,
            "head_output": head_output, "true_share": p[sees_bos, 0].mean() * write_norm / head_output,
            "true_share_null": uniform * write_norm / head_output,
        }  # fmt: skip
        for name, value in expected.items():
            assert is_close(row[name], value), (name, row[name], value)
        head_write = p[sees_bos, 0][:, None] * (bos_value @ w_o[head])
        layer_write, _, _ = by_layer.get((row["text"], layer), (0.0, 0.0, 0.0))
        by_layer[row["text"], layer] = (
            layer_write + head_write,
            norm(attn_out[sees_bos], axis=-1).mean(),
            uniform,
        )
    for row in model_run.rows("bos-write", "layer_texts"):
        layer_write, layer_output, _ = by_layer[row["text"], row["layer"]]
        assert is_close(row["layer_write"], norm(layer_write, axis=-1).mean())
        assert is_close(row["layer_output"], layer_output)
        assert is_close(row["layer_share"], norm(layer_write, axis=-1).mean() / layer_output)


def test_heads_without_queries_score_their_null_in_every_window() -> None:
    model = tiny_model("gemma2", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    run = phaselens.run(
        phaselens.load(model, tokenizer=toy_tokenizer()), metrics=["sinks", "attention-patterns"], texts=TEXTS
    )
    for row in run.rows("sinks", "texts").records():
        assert is_close(row["score"], row["null"])
    for row in run.rows("attention-patterns", "texts").records():
        assert is_close(row["entropy_normalised"], 1.0)
        assert all(
            is_close(row[name], row[f"{name}_null"]) for name in ("sink", "local", "itself", "concentration")
        )


def run_with_window_of_one() -> Run:
    lens = phaselens.load(
        tiny_model("gemma2", dtype=torch.float64, sliding_window=1), tokenizer=toy_tokenizer()
    )
    assert lens.info.windows == (1, None)
    return phaselens.run(lens, metrics=["sinks", "attention-patterns", "bos-write"], texts=TEXTS)


@pytest.mark.slow
def test_in_a_window_of_one_what_no_query_sees_is_missing_with_a_reason() -> None:
    run = run_with_window_of_one()
    assert not run.failed
    for row in run.rows("sinks", "texts").records():
        assert (row["score"] is None, row["score_all"]) == (row["layer"] == 0, row["score_all"])
        assert row["layer"] == 1 or row["score_all"] == 1.0
    assert "score is missing in layer 0: with a window of 1, only query 0 sees position 0" in " ".join(
        run.warnings
    )
    assert not [warning for warning in run.warnings if "NaN or infinite" in warning]
    (summary,) = run.rows("sinks", "summary").records()
    scores = [row["score"] for row in run.rows("sinks", "texts").records() if row["layer"] == 1]
    assert summary["mean_score"] == pytest.approx(np.mean(scores))
    for row in run.rows("attention-patterns", "texts").records():
        assert (row["sink"] is None) == (row["layer"] == 0)
        assert row["layer"] == 1 or is_close(row["itself"], 1.0)
    assert any(
        "sink, entropy_normalised and class are missing in layer 0" in warning for warning in run.warnings
    )
    for row in run.rows("bos-write", "texts").records():
        assert (row["write"] is None) == (row["layer"] == 0)
    assert any(
        "write is missing: with a window of 1, no query but the first" in warning for warning in run.warnings
    )
