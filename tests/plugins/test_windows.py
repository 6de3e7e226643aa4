"""Every column that speaks of attention, in layers with windows and learned sinks, against dense float64 attention."""

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

#: Shorter than the windows, as long, and longer.
TEXTS = [letters(3), letters(6, 2), letters(24, 3), letters(15, 11)]
WIDTH, DISTANCES = 5, 24


def exaone4() -> Any:
    """Full layers that have a `sliding_window`, and ignore it."""
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


def stray() -> Any:
    model = tiny_model("llama", dtype=torch.float64)
    model.config.sliding_window = 7  # nothing in the family reads it
    return model


def strong_sinks() -> Any:
    """Learned sinks that take nearly everything in one head, and little in another."""
    model = tiny_model("gpt-oss", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.copy_(torch.tensor([12.0, 2.0, -2.0, 0.0]))
    return model


MODELS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    "mistral": (lambda: tiny_model("mistral", dtype=torch.float64), (7, 7)),
    "gemma2": (lambda: tiny_model("gemma2", dtype=torch.float64), (7, None)),
    "window of 2": (lambda: tiny_model("mistral", dtype=torch.float64, sliding_window=2), (2, 2)),
    "gpt-oss": (lambda: tiny_model("gpt-oss", dtype=torch.float64), (7, None)),
    "gpt-oss, strong sinks": (strong_sinks, (7, None)),
    "exaone4": (exaone4, (7, None)),
    "llama, stray window": (stray, (None, None)),
}


class Measured:
    """A run, and of each text the eager patterns [layer, head, query, key], values and outputs of heads."""

    def __init__(self, name: str) -> None:
        build, self.windows = MODELS[name]
        model = build()
        tokenizer = toy_tokenizer()
        model.set_attn_implementation("eager")
        self.patterns = []
        for text in TEXTS:
            with torch.no_grad():
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                out = model(ids, output_attentions=True, use_cache=False)
            self.patterns.append(torch.stack([each[0] for each in out.attentions]).double().numpy())
        self.lens = phaselens.load(model, label="made", tokenizer=tokenizer)
        assert self.lens.info.windows == self.windows
        self.run = phaselens.run(
            self.lens,
            metrics=[("attention-patterns", {"local_width": WIDTH, "distances": DISTANCES}), "sinks", "bos-write"],
            texts=TEXTS, batch_tokens=64,
        )  # fmt: skip
        assert not self.run.failed, [
            each for name in self.run.failed for each in self.run.metrics[name].failures
        ]

    def rows(self, metric: str, table: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.run.rows(metric, table).records()
        return found

    def pattern(self, row: dict[str, Any]) -> np.ndarray:
        """[query, key]"""
        pattern: np.ndarray = self.patterns[int(row["text"])][row["layer"], row["head"]]
        return pattern

    def visible(self, layer: int, n: int) -> np.ndarray:
        """[query, key]"""
        back = np.arange(n)[:, None] - np.arange(n)
        return (back >= 0) & (back < (self.windows[layer] or n))


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.param)


def same(value: float | None, want: float) -> bool:
    if np.isnan(want):
        return value is None
    return value is not None and bool(np.isclose(value, want, rtol=1e-6, atol=1e-7))


def entropies(pattern: np.ndarray) -> np.ndarray:
    logs = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
    entropy: np.ndarray = -(pattern * logs).sum(-1)
    return entropy


def patterns_of(p: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """What `attention-patterns` says of one head, from its definitions: p [query, key]."""
    n = len(p)
    seen = visible.sum(-1)
    received = p.sum(0) / n
    back = np.arange(n)[:, None] - np.arange(n)
    near = (back > 0) & (back <= WIDTH)
    sees_bos = visible[:, 0] & (np.arange(n) > 0)
    return {
        "entropy": entropies(p).mean(),
        "entropy_normalised": (entropies(p)[seen > 1] / np.log(seen[seen > 1])).mean(),
        "concentration": 1 - entropies(received) / np.log(n),
        "sink": p[sees_bos, 0].mean(),
        "local": (p * (near & (np.arange(n) > 0)))[1:].sum(-1).mean(),
        "itself": p.diagonal()[1:].mean(),
        "local_with_bos": (p * near)[1:].sum(-1).mean(),
    }


def test_every_column_of_attention_patterns_and_its_null(measured: Measured) -> None:
    for row in measured.rows("attention-patterns", "texts"):
        p = measured.pattern(row)
        visible = measured.visible(row["layer"], len(p))
        uniform = visible / visible.sum(-1, keepdims=True)
        for name, want in patterns_of(p, visible).items():
            assert same(row[name], want), (name, row[name], want)
        for name, want in patterns_of(uniform, visible).items():
            null = "null" if name == "entropy" else f"{name}_null"
            assert same(row[null], want), (null, row[null], want)
        assert row["itself"] >= 0
        assert 0 <= row["concentration"] <= 1 + 1e-7


def test_attention_by_distance_is_a_mean_over_the_pairs_that_are_seen(measured: Measured) -> None:
    for row in measured.rows("attention-patterns", "profile"):
        layer, distance = row["layer"], row["distance"]
        values, nulls = [], []
        for patterns in measured.patterns:
            n = patterns.shape[-1]
            if distance >= n or distance >= (measured.windows[layer] or n):
                continue
            visible = measured.visible(layer, n)
            uniform = visible / visible.sum(-1, keepdims=True)
            values.append(patterns[layer].diagonal(-distance, axis1=-2, axis2=-1).mean())
            nulls.append(uniform.diagonal(-distance).mean())
        assert row["n_texts"] == len(values)
        assert same(row["attention"], np.mean(values) if values else np.nan), row
        assert same(row["null"], np.mean(nulls) if nulls else np.nan), row


def test_every_column_of_sinks_and_its_null(measured: Measured) -> None:
    for row in measured.rows("sinks", "texts"):
        p = measured.pattern(row)
        visible = measured.visible(row["layer"], len(p))
        uniform = visible / visible.sum(-1, keepdims=True)
        for name, matrix in (("score", p), ("null", uniform)):
            all_name = "score_all" if name == "score" else "null_all"
            assert same(row[all_name], matrix[visible[:, 0], 0].mean())
            assert same(row[name], matrix[1:][visible[1:, 0], 0].mean())


def test_the_strongest_key_has_the_largest_mean_over_the_queries_that_see_it(measured: Measured) -> None:
    for row in measured.rows("sinks", "strongest"):
        p = measured.pattern(row)
        visible = measured.visible(row["layer"], len(p))
        scores = p.sum(0) / visible.sum(0)
        seeing = visible.sum(0)
        enough = seeing >= min(8, (seeing[1] + 1) // 2)
        best = 1 + int(np.where(enough, scores, -1)[1:].argmax())
        assert row["position"] == best
        assert same(row["score"], scores[best])
        uniform = visible / visible.sum(-1, keepdims=True)
        assert same(row["null"], uniform[visible[:, best], best].mean())


def test_every_column_of_bos_write_and_its_null(measured: Measured) -> None:
    lens = measured.lens
    activations: list[dict[str, np.ndarray]] = []
    for text in TEXTS:
        seen: dict[str, np.ndarray] = {}

        def keep(name: str, seen: dict[str, np.ndarray] = seen) -> Any:
            return lambda tensor, hook: seen.__setitem__(name, tensor[0].double().numpy())

        names = [f"blocks.{layer}.attn.hook_{point}" for layer in (0, 1) for point in ("v", "z", "out")]
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        lens.stream(ids, [(name, keep(name)) for name in names])
        activations.append(seen)
    norm = np.linalg.norm
    layers: dict[tuple[str, int], tuple[np.ndarray, float, float]] = {}
    for row in measured.rows("bos-write", "texts"):
        p, layer, head = measured.pattern(row), row["layer"], row["head"]
        visible = measured.visible(layer, len(p))
        sees = visible[:, 0] & (np.arange(len(p)) > 0)
        v, z, out = (
            activations[int(row["text"])][f"blocks.{layer}.attn.hook_{point}"] for point in ("v", "z", "out")
        )
        n_heads = lens.info.n_heads
        z, v = z.reshape(len(p), n_heads, -1), v.reshape(len(p), lens.info.n_kv_heads, -1)
        group = n_heads // v.shape[1]
        w_o = lens.blocks[layer].attn.W_O.detach().double().numpy().reshape(n_heads, z.shape[-1], -1)
        uniform = (visible / visible.sum(-1, keepdims=True))[sees, 0].mean()
        first = v[0, head // group]
        wrote = norm(first @ w_o[head])
        heads = norm(z[sees, head] @ w_o[head], axis=-1).mean()
        want = {
            "attn": p[sees, 0].mean(), "attn_null": uniform, "value_norm": norm(first),
            "value_norm_null": norm(v[1:, head // group], axis=-1).mean(),
            "write": p[sees, 0].mean() * norm(first), "null": uniform * norm(first),
            "true_write": p[sees, 0].mean() * wrote, "true_write_null": uniform * wrote,
            "head_output": heads, "true_share": p[sees, 0].mean() * wrote / heads,
            "true_share_null": uniform * wrote / heads,
        }  # fmt: skip
        for name, value in want.items():
            assert same(row[name], value), (name, row[name], value)
        whole = p[sees, 0][:, None] * (first @ w_o[head])
        before, _, _ = layers.get((row["text"], layer), (0.0, 0.0, 0.0))
        layers[row["text"], layer] = before + whole, norm(out[sees], axis=-1).mean(), uniform
    for row in measured.rows("bos-write", "layer_texts"):
        together, output, _ = layers[row["text"], row["layer"]]
        assert same(row["layer_write"], norm(together, axis=-1).mean())
        assert same(row["layer_output"], output)
        assert same(row["layer_share"], norm(together, axis=-1).mean() / output)


def test_heads_without_queries_score_their_null_in_every_window() -> None:
    model = tiny_model("gemma2", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    run = phaselens.run(
        phaselens.load(model, tokenizer=toy_tokenizer()), metrics=["sinks", "attention-patterns"], texts=TEXTS
    )
    for row in run.rows("sinks", "texts").records():
        assert same(row["score"], row["null"])
    for row in run.rows("attention-patterns", "texts").records():
        assert same(row["entropy_normalised"], 1.0)
        assert all(
            same(row[name], row[f"{name}_null"]) for name in ("sink", "local", "itself", "concentration")
        )


def single() -> Run:
    lens = phaselens.load(
        tiny_model("gemma2", dtype=torch.float64, sliding_window=1), tokenizer=toy_tokenizer()
    )
    assert lens.info.windows == (1, None)
    return phaselens.run(lens, metrics=["sinks", "attention-patterns", "bos-write"], texts=TEXTS)


def test_in_a_window_of_one_what_nobody_sees_is_null_with_its_reason() -> None:
    run = single()
    assert not run.failed
    for row in run.rows("sinks", "texts").records():
        assert (row["score"] is None, row["score_all"]) == (row["layer"] == 0, row["score_all"])
        assert row["layer"] == 1 or row["score_all"] == 1.0
    assert "score is null in layer 0: with a window of 1, only query 0 sees position 0" in " ".join(
        run.warnings
    )
    assert not [note for note in run.warnings if "NaN or infinite" in note]
    (summary,) = run.rows("sinks", "summary").records()
    scores = [row["score"] for row in run.rows("sinks", "texts").records() if row["layer"] == 1]
    assert summary["mean_score"] == pytest.approx(np.mean(scores))
    for row in run.rows("attention-patterns", "texts").records():
        assert (row["sink"] is None) == (row["layer"] == 0)
        assert row["layer"] == 1 or same(row["itself"], 1.0)
    assert any("sink, entropy_normalised and class are null in layer 0" in note for note in run.warnings)
    for row in run.rows("bos-write", "texts").records():
        assert (row["write"] is None) == (row["layer"] == 0)
    assert any("write is null: with a window of 1, no query but the first" in note for note in run.warnings)
