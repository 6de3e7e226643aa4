"""All observational metrics on tiny models: against plain float64 numpy, by invariance, and on bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.runs import Run
from phaselens_plugins.compression import Compression
from tests.marks import first_quick
from tests.toys import letters, toy_lens

METRICS = (
    "attention-patterns",
    "bos-norm",
    "bos-write",
    "compression",
    "layer-balance",
    "massive-activations",
    "massive-values",
)
TEXTS = [letters(9), letters(24, 3), letters(15, 11)]


def run(lens: Any, texts: list[str] = TEXTS, metrics: Any = METRICS, **options: Any) -> Run:
    return phaselens.run(lens, metrics=list(metrics), texts=texts, **options)


def texts_table(found: Run, metric: str) -> list[dict[str, Any]]:
    return found.rows(metric, "texts").records()


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def found(lens: Any) -> Run:
    measured = run(lens, batch_tokens=64)
    assert not measured.failed, [
        str(one) for name in measured.failed for one in measured.metrics[name].failures
    ]
    return measured


@pytest.fixture(scope="module")
def dense(lens: Any) -> list[dict[str, np.ndarray]]:
    """Every activation of each text alone, unpadded, by name without `blocks.`; attention as a matrix."""
    points = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    points += [f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "z", "pattern")]
    result = []
    for text in TEXTS:
        seen: dict[str, np.ndarray] = {}

        def keep(name: str, seen: dict[str, np.ndarray] = seen) -> Any:
            return lambda tensor, hook: seen.__setitem__(name, tensor[0].numpy())

        names = [f"{layer}.{point}" for layer in range(2) for point in points]
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        lens.stream(ids, [(f"blocks.{name}", keep(name)) for name in names])
        result.append(seen)
    return result


def norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-1))


def each(found: Run, metric: str, dense: list[dict[str, np.ndarray]]) -> Any:
    """(record, activations of that text, "layer.") of every row of a metric's table `texts`."""
    for record in texts_table(found, metric):
        yield record, dense[int(record["text"])], f"{record['layer']}."


def close(value: float, want: float) -> bool:
    return bool(np.isclose(value, want, rtol=1e-9, atol=1e-11))


def test_bos_norm(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, seen, at in each(found, "bos-norm", dense):
        size, before = norms(seen[at + "hook_resid_post"]), norms(seen[at + "hook_resid_pre"])
        assert close(row["bos_norm"], size[0])
        assert close(row["bos_ratio"], size[0] / size[1:].mean())
        assert close(row["bos_ratio_median"], size[0] / np.median(size[1:]))
        assert close(row["bos_change"], size[0] - before[0])


def test_compression(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, seen, at in each(found, "compression", dense):
        x = seen[at + "hook_resid_post"]
        entropy = spectral_entropy(x)
        p = np.linalg.svd(x, compute_uv=False) ** 2
        p = p / p.sum()
        assert abs(row["entropy"] - entropy) <= row["entropy_error"] + 1e-12
        assert row["entropy_error"] < 1e-8
        assert close(row["entropy_normalised"], entropy / np.log(min(x.shape)))
        assert close(row["anisotropy"], p[0])
        assert close(row["effective_rank"], np.exp(entropy))
        assert row["entropy_bound"] is None or row["entropy"] <= row["entropy_bound"]
        assert row["anisotropy_bound"] <= row["anisotropy"]


def spectral_entropy(x: np.ndarray) -> float:
    """Of x [pos, d_model], by singular values in float64."""
    p = np.linalg.svd(x, compute_uv=False) ** 2
    p = p / p.sum()
    return float(-(p * np.log(p)).sum())


def test_entropy_error_bounds_the_arithmetic_and_not_the_forward() -> None:
    """In bfloat16 the rows of the forward are rounded; their entropy is exact, and far from that in float64."""
    rounded, exact = toy_lens("llama-gqa", dtype=torch.bfloat16), toy_lens("llama-gqa", dtype=torch.bfloat16)
    exact.original_model.double()
    rows: list[np.ndarray] = []
    tables = [
        texts_table(run(model, metrics=["compression"], batch_tokens=1), "compression")
        for model in (rounded, exact)
    ]
    for row, in_float64 in zip(*tables, strict=True):
        ids = torch.tensor([rounded.text_tokenizer(TEXTS[int(row["text"])])["input_ids"]])
        point = f"blocks.{row['layer']}.hook_resid_post"
        rounded.stream(ids, [(point, lambda x, hook: rows.append(x[0].double().numpy()))])
        of_rows = spectral_entropy(rows.pop())
        assert abs(row["entropy"] - of_rows) <= row["entropy_error"] + 1e-12
        assert abs(row["entropy"] - in_float64["entropy"]) > 1e3 * row["entropy_error"]
    (column,) = (each for each in Compression.spec("texts").columns if each.name == "entropy_error")
    assert (
        "from Gram matrix and eigenvalues; that of the forward, in the model's dtype, is not in it"
        in column.help
    )


def test_massive_activations(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    top = {
        (r["text"], r["layer"]): r
        for r in found.rows("massive-activations", "top").records()
        if not r["rank"]
    }
    for row, seen, at in each(found, "massive-activations", dense):
        x = seen[at + "hook_resid_post"]
        assert close(row["max_abs"], np.abs(x).max())
        assert close(row["ratio"], np.abs(x).max() / np.median(np.abs(x)))
        first = top[row["text"], row["layer"]]
        assert close(first["value"], x[first["position"], first["dimension"]])
        assert close(abs(first["value"]), row["max_abs"])


def test_layer_balance(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, seen, at in each(found, "layer-balance", dense):
        a, m = seen[at + "hook_attn_out"], seen[at + "hook_mlp_out"]
        change = seen[at + "hook_resid_post"] - seen[at + "hook_resid_pre"]
        share = norms(a) / (norms(a) + norms(m))
        assert close(row["share"], share.mean())
        assert close(row["share_bos"], share[0])
        assert close(row["share_of_means"], norms(a).mean() / (norms(a).mean() + norms(m).mean()))
        assert close(row["projection"], np.median((a * change).sum(-1) / (change**2).sum(-1)))
        assert close(row["mlp_median"], np.median(norms(m)))


def test_massive_values(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    points = {"q": "rot_q", "k": "rot_k", "v": "v", "q_pre": "q", "k_pre": "k"}
    for row, seen, at in each(found, "massive-values", dense):
        m = np.sqrt((seen[f"{at}attn.hook_{points[row['tensor']]}"] ** 2).sum(0))
        assert row["count_global"] == (m > 5 * m.mean()).sum()
        assert row["n_cells"] == m.size
        assert row["count_per_head"] == (m > 5 * m.mean(-1, keepdims=True)).sum()
        assert close(row["max_ratio"], m.max() / m.mean())
    pairs = {
        (r["text"], r["layer"], r["tensor"]): r["count_pairs"] for r in texts_table(found, "massive-values")
    }
    for (text, layer, tensor), count in pairs.items():
        if tensor in ("q", "k"):
            assert count is not None, "rotation keeps pair norms"
            assert count == pairs[text, layer, f"{tensor}_pre"]


def test_bos_write(found: Run, lens: Any, dense: list[dict[str, np.ndarray]]) -> None:
    for row, seen, at in each(found, "bos-write", dense):
        head, layer = row["head"], row["layer"]
        attention = seen[at + "attn.hook_pattern"][head, 1:, 0]
        value = seen[at + "attn.hook_v"][0, head // 2]
        w_o = lens.blocks[layer].attn.W_O[head].detach().numpy()
        whole = norms(seen[at + "attn.hook_z"][1:, head] @ w_o)
        assert close(row["attn"], attention.mean())
        assert close(row["write"], attention.mean() * norms(value))
        assert close(row["true_write"], norms(attention[:, None] * (value @ w_o)).mean())
        assert close(row["head_output"], whole.mean())
    for row in found.rows("bos-write", "layer_texts").records():
        seen, at = dense[int(row["text"])], f"{row['layer']}."
        w_o = lens.blocks[row["layer"]].attn.W_O.detach().numpy()
        attention = seen[at + "attn.hook_pattern"][:, 1:, 0]
        value = seen[at + "attn.hook_v"][0].repeat(2, axis=0)
        written = np.einsum("hq,hd,hdm->qm", attention, value, w_o)
        assert close(row["layer_write"], norms(written).mean())
        assert close(row["layer_output"], norms(seen[at + "hook_attn_out"][1:]).mean())


def test_attention_patterns(found: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, seen, at in each(found, "attention-patterns", dense):
        p = seen[at + "attn.hook_pattern"][row["head"]]
        n = len(p)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        share = p.sum(0) / n
        near = [p[q, max(1, q - 5) : q].sum() for q in range(1, n)]
        with_bos = [p[q, max(0, q - 5) : q].sum() for q in range(1, n)]
        assert close(row["entropy"], entropy.mean())
        assert close(row["entropy_normalised"], (entropy[1:] / np.log(np.arange(2, n + 1))).mean())
        assert close(row["concentration"], 1 + (share * np.log(share)).sum() / np.log(n))
        assert close(row["sink"], p[1:, 0].mean())
        assert close(row["itself"], p.diagonal()[1:].mean())
        assert close(row["local"], np.mean(near))
        assert close(row["local_with_bos"], np.mean(with_bos))
    profile = found.rows("attention-patterns", "profile").records()
    for layer in range(2):
        for distance in range(25):
            means = [
                np.mean([p.diagonal(-distance).mean() for p in seen[f"{layer}.attn.hook_pattern"]])
                for seen in dense
                if len(seen[f"{layer}.attn.hook_pattern"][0]) > distance
            ]
            (row,) = (r for r in profile if (r["layer"], r["distance"]) == (layer, distance))
            assert row["n_texts"] == len(means)
            assert (row["attention"] is None) if not means else close(row["attention"], float(np.mean(means)))


def test_no_result_depends_on_batches_padding_or_order(lens: Any, found: Run) -> None:
    """Tables agree to float64's rounding, whatever stands beside a text."""
    one_by_one = run(lens, batch_tokens=1)
    reversed_ = run(lens, [*reversed(TEXTS)], batch_tokens=1000)
    for metric in METRICS:
        for table in found.metrics[metric].tables:
            assert_same(found.rows(metric, table).records(), one_by_one.rows(metric, table).records())
        other = texts_table(reversed_, metric)
        for record in other:
            record["text"] = str(2 - int(record["text"]))
        assert_same(sorted(texts_table(found, metric), key=place), sorted(other, key=place))


@pytest.mark.parametrize("metric", [*METRICS, "sinks"])
def test_the_order_of_texts_changes_no_interval(lens: Any, metric: str) -> None:
    """Texts are drawn in an order that follows from what they say."""
    texts = [*TEXTS, letters(12, 5), letters(7, 2)]
    forwards, backwards = (
        run(lens, some, metrics=[metric], batch_tokens=1000) for some in (texts, texts[::-1])
    )
    intervals = 0
    for table, found in forwards.metrics[metric].tables.items():
        columns = [column.name for column in found.spec.columns]
        if "text" not in columns:
            intervals += sum(column.endswith(("low", "high")) for column in columns)
            assert_same(found.records(), backwards.rows(metric, table).records())
    assert intervals >= 2


def place(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("text", "layer", "head", "tensor"))


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for name, value in one.items():
            if isinstance(value, float) and name != "entropy_error":
                assert two[name] == pytest.approx(value, rel=1e-9, abs=1e-10), (name, one)
            elif name != "entropy_error":
                assert two[name] == value, (name, one)


def test_float32_agrees_with_float64(found: Run) -> None:
    single = run(toy_lens("llama-gqa"))
    for metric in METRICS:
        for one, two in zip(texts_table(found, metric), texts_table(single, metric), strict=True):
            for name, value in one.items():
                if isinstance(value, float) and name != "entropy_error":
                    assert two[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (metric, name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_weights_are_null_with_a_reason_from_their_layer_on(poison: float) -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        lens.original_model.model.layers[1].mlp.down_proj.weight[3, 2] = poison
    found = run(lens)
    assert not found.failed, [str(one) for name in found.failed for one in found.metrics[name].failures]
    first = {
        "bos-norm": "bos_norm",
        "compression": "entropy",
        "massive-activations": "ratio",
        "layer-balance": "share",
    }
    for metric, column in first.items():
        for row in texts_table(found, metric):
            assert (row[column] is None) == (row["layer"] == 1), (metric, row)
        assert any(
            f"{metric}: " in note and "NaN or infinite in layer 1" in note for note in found.warnings
        ), metric
    for metric in ("attention-patterns", "bos-write", "massive-values"):
        column = {"attention-patterns": "entropy", "bos-write": "write", "massive-values": "count_global"}[
            metric
        ]
        assert all(row[column] is not None for row in texts_table(found, metric)), (
            "attention comes before the MLP"
        )
    found.to_dict()


def test_one_token_texts_are_null_with_a_reason() -> None:
    found = run(toy_lens("llama"), ["", letters(8)])
    assert not found.failed
    columns = {
        "attention-patterns": "entropy",
        "bos-norm": "bos_ratio",
        "bos-write": "write",
        "compression": "entropy",
    }
    for metric, column in columns.items():
        missing = {row["text"]: row[column] is None for row in texts_table(found, metric)}
        assert missing == {"0": True, "1": False}, metric
        assert any(f"{metric}: " in note and "fewer than two tokens" in note for note in found.warnings), (
            metric
        )


def test_dead_activations_are_null_with_a_reason() -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        for parameter in lens.original_model.parameters():
            parameter.zero_()
    found = run(lens)
    assert not found.failed, [str(one) for name in found.failed for one in found.metrics[name].failures]
    for metric, column in (
        ("compression", "entropy"), ("bos-norm", "bos_ratio"), ("massive-activations", "ratio"),
        ("layer-balance", "share"), ("bos-write", "true_share"), ("massive-values", "count_global"),
    ):  # fmt: skip
        assert all(row[column] is None for row in texts_table(found, metric)), metric
        assert any(f"{metric}: " in note and "all zero" in note for note in found.warnings), metric
    assert all(row["entropy_normalised"] > 0.999999 for row in texts_table(found, "attention-patterns"))


@pytest.mark.parametrize(
    "family", first_quick(["mistral", "gemma2", "gpt2", "gpt-neox", "qwen3", "cohere2", "gpt-oss"])
)
def test_other_families(family: str) -> None:
    """Sliding windows, softcaps, shared heads, partial or interleaved rotation, biases, norms after attention."""
    found = run(toy_lens(family))
    assert not found.failed, [str(one) for name in found.failed for one in found.metrics[name].failures]
    unrotated = {"gpt2": (0, 1), "cohere2": (1,)}.get(family, ())
    for row in texts_table(found, "massive-values"):
        if row["tensor"] == "q":
            assert (row["count_pairs"] is None) == (row["layer"] in unrotated)
    for row in texts_table(found, "attention-patterns"):
        assert 0 <= row["local"] <= 1
        assert row["entropy_normalised"] <= 1 + 1e-6


def test_everything_has_a_null_and_a_definition(found: Run) -> None:
    for metric in METRICS:
        result = found.metrics[metric]
        assert result.definition
        assert result.metric.display is not None
        columns = [column.name for column in found.rows(metric, "layers").spec.columns]
        assert {"ci_low", "ci_high", "null"} <= set(columns), metric


def test_all_metrics_together_cost_one_forward(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stream = type(lens).stream

    def counted(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(tokens.shape))
        return stream(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(lens), "stream", counted)
    run(lens, metrics=[*METRICS, "sinks"], batch_tokens=10_000)
    assert calls == [(3, 25)]


def test_what_is_kept_does_not_grow_with_the_length_of_texts(
    lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers by text, layer and head; never an activation."""
    from phaselens.plugin import Metric, plugins

    sizes: dict[int, dict[str, int]] = {}
    length = 0

    def watch(metric: type[Metric[Any]]) -> None:
        compute = metric.compute

        def measured(self: Any) -> Any:
            kept = self.per_text._values.values()
            sizes[length][self.name] = sum(value.nbytes for by_place in kept for value in by_place.values())
            held = [name for name, value in vars(self).items() if isinstance(value, torch.Tensor)]
            assert not held
            return compute(self)

        monkeypatch.setattr(metric, "compute", measured)

    for name in METRICS:
        watch(plugins().metric(name))
    for length in (6, 60):
        sizes[length] = {}
        run(lens, [letters(length)])
    assert sizes[6] == sizes[60]
    assert set(sizes[6]) == set(METRICS)


@pytest.mark.parametrize(
    ("norms_of_bos", "layer"), [((5.0, 4.0, 3.0), None), ((5.0, 5.5, 7.5), 1), ((5.0, 4.0, 4.5), 1)]
)
def test_the_write_layer_is_null_where_no_layer_adds_to_the_norm(
    norms_of_bos: Any, layer: int | None
) -> None:
    from phaselens_plugins.bos_norm import BosNorm
    from tests.plugins.views import info, view

    metric = BosNorm(info(n_layers=2), BosNorm.Params())
    rows = [torch.ones(1, 4, 8) for _ in norms_of_bos]
    for row, norm in zip(rows, norms_of_bos, strict=True):
        row[0, 0] *= norm / 8**0.5
    metric.update(view({"hook_resid_pre": rows[0], "hook_resid_post": rows[1]}, (4,), 0))
    metric.update(view({"hook_resid_post": rows[2]}, (4,), 1))
    (summary,) = metric.compute()["summary"].records()
    assert summary["write_layer"] == layer
    said = "write_layer is null: no layer adds to the norm of position 0"
    assert (said in metric.warnings) == (layer is None)
