"""Observational metrics on tiny models: against plain float64 numpy, by invariance, and on bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.runs import Run
from phaselens_plugins.compression import Compression
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer
    from phaselens.plugin import Metric, Table

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


def run(
    lens: HookedTransformer, texts: list[str] = TEXTS, metrics: Sequence[str] = METRICS, **options: object
) -> Run:
    return phaselens.run(lens, metrics=list(metrics), texts=texts, **options)


def texts_table(result: Run, metric: str) -> list[dict[str, Any]]:
    return result.rows(metric, "texts").records()


def assert_no_failures(result: Run) -> None:
    assert not result.failed, [
        str(failure) for name in result.failed for failure in result.metrics[name].failures
    ]


@pytest.fixture(scope="module")
def lens() -> HookedTransformer:
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def result(lens: HookedTransformer) -> Run:
    batched = run(lens, batch_tokens=64)
    assert_no_failures(batched)
    return batched


@pytest.fixture(scope="module")
def dense(lens: HookedTransformer) -> list[dict[str, np.ndarray]]:
    """Return the activations of each text run alone, by name without `blocks.`; attention as a matrix."""
    points = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    points += [f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "z", "pattern")]
    by_text = []
    for text in TEXTS:
        activations: dict[str, np.ndarray] = {}

        def recorder(
            name: str, activations: dict[str, np.ndarray] = activations
        ) -> Callable[[torch.Tensor, object], None]:
            return lambda tensor, hook: activations.__setitem__(name, tensor[0].numpy())

        names = [f"{layer}.{point}" for layer in range(2) for point in points]
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        lens.stream(ids, [(f"blocks.{name}", recorder(name)) for name in names])
        by_text.append(activations)
    return by_text


def norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-1))


def rows_with_activations(
    result: Run, metric: str, dense: list[dict[str, np.ndarray]]
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray], str]]:
    """Yield for every row of a metric's table `texts` the record, that text's activations, and the prefix "layer."."""
    for record in texts_table(result, metric):
        yield record, dense[int(record["text"])], f"{record['layer']}."


def is_close(value: float, expected: float) -> bool:
    return bool(np.isclose(value, expected, rtol=1e-9, atol=1e-11))


def test_bos_norm(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, activations, prefix in rows_with_activations(result, "bos-norm", dense):
        norms_after = norms(activations[prefix + "hook_resid_post"])
        norms_before = norms(activations[prefix + "hook_resid_pre"])
        assert is_close(row["bos_norm"], norms_after[0])
        assert is_close(row["bos_ratio"], norms_after[0] / norms_after[1:].mean())
        assert is_close(row["bos_ratio_median"], norms_after[0] / np.median(norms_after[1:]))
        assert is_close(row["bos_change"], norms_after[0] - norms_before[0])


def test_compression(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, activations, prefix in rows_with_activations(result, "compression", dense):
        x = activations[prefix + "hook_resid_post"]
        entropy = spectral_entropy(x)
        p = np.linalg.svd(x, compute_uv=False) ** 2
        p = p / p.sum()
        assert abs(row["entropy"] - entropy) <= row["entropy_error"] + 1e-12
        assert row["entropy_error"] < 1e-8
        assert is_close(row["entropy_normalised"], entropy / np.log(min(x.shape)))
        assert is_close(row["anisotropy"], p[0])
        assert is_close(row["effective_rank"], np.exp(entropy))
        assert row["entropy_bound"] is None or row["entropy"] <= row["entropy_bound"]
        assert row["anisotropy_bound"] <= row["anisotropy"]


def spectral_entropy(x: np.ndarray) -> float:
    """Return the matrix entropy of x [pos, d_model], from singular values in float64."""
    p = np.linalg.svd(x, compute_uv=False) ** 2
    p = p / p.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.slow
def test_entropy_error_bounds_the_arithmetic_and_not_the_forward() -> None:
    """The forward rounds its rows in bfloat16; their entropy is exact, but far from that of a float64 forward."""
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
        entropy = spectral_entropy(rows.pop())
        assert abs(row["entropy"] - entropy) <= row["entropy_error"] + 1e-12
        assert abs(row["entropy"] - in_float64["entropy"]) > 1e3 * row["entropy_error"]
    (column,) = (column for column in Compression.spec("texts").columns if column.name == "entropy_error")
    assert (
        "from Gram matrix and eigenvalues; that of the forward, in the model's dtype, is not included"
        in column.help
    )


def test_massive_activations(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    top = {
        (top_row["text"], top_row["layer"]): top_row
        for top_row in result.rows("massive-activations", "top").records()
        if not top_row["rank"]
    }
    for row, activations, prefix in rows_with_activations(result, "massive-activations", dense):
        x = activations[prefix + "hook_resid_post"]
        assert is_close(row["max_abs"], np.abs(x).max())
        assert is_close(row["ratio"], np.abs(x).max() / np.median(np.abs(x)))
        largest = top[row["text"], row["layer"]]
        assert is_close(largest["value"], x[largest["position"], largest["dimension"]])
        assert is_close(abs(largest["value"]), row["max_abs"])


def test_layer_balance(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, activations, prefix in rows_with_activations(result, "layer-balance", dense):
        attn, mlp = activations[prefix + "hook_attn_out"], activations[prefix + "hook_mlp_out"]
        change = activations[prefix + "hook_resid_post"] - activations[prefix + "hook_resid_pre"]
        share = norms(attn) / (norms(attn) + norms(mlp))
        assert is_close(row["share"], share.mean())
        assert is_close(row["share_bos"], share[0])
        assert is_close(row["share_of_means"], norms(attn).mean() / (norms(attn).mean() + norms(mlp).mean()))
        assert is_close(row["projection"], np.median((attn * change).sum(-1) / (change**2).sum(-1)))
        assert is_close(row["mlp_median"], np.median(norms(mlp)))


def test_massive_values(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    points = {"q": "rot_q", "k": "rot_k", "v": "v", "q_pre": "q", "k_pre": "k"}
    for row, activations, prefix in rows_with_activations(result, "massive-values", dense):
        cell_norms = np.sqrt((activations[f"{prefix}attn.hook_{points[row['tensor']]}"] ** 2).sum(0))
        assert row["count_global"] == (cell_norms > 5 * cell_norms.mean()).sum()
        assert row["n_cells"] == cell_norms.size
        assert row["count_per_head"] == (cell_norms > 5 * cell_norms.mean(-1, keepdims=True)).sum()
        assert is_close(row["max_ratio"], cell_norms.max() / cell_norms.mean())
    pair_counts = {
        (table_row["text"], table_row["layer"], table_row["tensor"]): table_row["count_pairs"]
        for table_row in texts_table(result, "massive-values")
    }
    for (text, layer, tensor), count in pair_counts.items():
        if tensor in ("q", "k"):
            assert count is not None, "rotation keeps pair norms"
            assert count == pair_counts[text, layer, f"{tensor}_pre"]


def test_bos_write(result: Run, lens: HookedTransformer, dense: list[dict[str, np.ndarray]]) -> None:
    for row, activations, prefix in rows_with_activations(result, "bos-write", dense):
        head, layer = row["head"], row["layer"]
        attention = activations[prefix + "attn.hook_pattern"][head, 1:, 0]
        value = activations[prefix + "attn.hook_v"][0, head // 2]
        w_o = lens.blocks[layer].attn.W_O[head].detach().numpy()
        head_output = norms(activations[prefix + "attn.hook_z"][1:, head] @ w_o)
        assert is_close(row["attn"], attention.mean())
        assert is_close(row["write"], attention.mean() * norms(value))
        assert is_close(row["true_write"], norms(attention[:, None] * (value @ w_o)).mean())
        assert is_close(row["head_output"], head_output.mean())
    for row in result.rows("bos-write", "layer_texts").records():
        activations, prefix = dense[int(row["text"])], f"{row['layer']}."
        w_o = lens.blocks[row["layer"]].attn.W_O.detach().numpy()
        attention = activations[prefix + "attn.hook_pattern"][:, 1:, 0]
        value = activations[prefix + "attn.hook_v"][0].repeat(2, axis=0)
        layer_write = np.einsum("hq,hd,hdm->qm", attention, value, w_o)
        assert is_close(row["layer_write"], norms(layer_write).mean())
        assert is_close(row["layer_output"], norms(activations[prefix + "hook_attn_out"][1:]).mean())


def test_attention_patterns(result: Run, dense: list[dict[str, np.ndarray]]) -> None:
    for row, activations, prefix in rows_with_activations(result, "attention-patterns", dense):
        p = activations[prefix + "attn.hook_pattern"][row["head"]]
        n = len(p)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        share = p.sum(0) / n
        local = [p[q, max(1, q - 5) : q].sum() for q in range(1, n)]
        local_with_bos = [p[q, max(0, q - 5) : q].sum() for q in range(1, n)]
        assert is_close(row["entropy"], entropy.mean())
        assert is_close(row["entropy_normalised"], (entropy[1:] / np.log(np.arange(2, n + 1))).mean())
        assert is_close(row["concentration"], 1 + (share * np.log(share)).sum() / np.log(n))
        assert is_close(row["sink"], p[1:, 0].mean())
        assert is_close(row["itself"], p.diagonal()[1:].mean())
        assert is_close(row["local"], np.mean(local))
        assert is_close(row["local_with_bos"], np.mean(local_with_bos))
    profile = result.rows("attention-patterns", "profile").records()
    for layer in range(2):
        for distance in range(25):
            means = [
                np.mean([p.diagonal(-distance).mean() for p in activations[f"{layer}.attn.hook_pattern"]])
                for activations in dense
                if len(activations[f"{layer}.attn.hook_pattern"][0]) > distance
            ]
            (row,) = (
                profile_row
                for profile_row in profile
                if (profile_row["layer"], profile_row["distance"]) == (layer, distance)
            )
            assert row["n_texts"] == len(means)
            assert (
                (row["attention"] is None) if not means else is_close(row["attention"], float(np.mean(means)))
            )


def test_no_result_depends_on_batches_padding_or_order(lens: HookedTransformer, result: Run) -> None:
    """Tables agree to float64's rounding, whatever texts share a batch."""
    one_by_one = run(lens, batch_tokens=1)
    reversed_ = run(lens, [*reversed(TEXTS)], batch_tokens=1000)
    for metric in METRICS:
        for table in result.metrics[metric].tables:
            assert_same(result.rows(metric, table).records(), one_by_one.rows(metric, table).records())
        reversed_rows = texts_table(reversed_, metric)
        for record in reversed_rows:
            record["text"] = str(2 - int(record["text"]))
        assert_same(sorted(texts_table(result, metric), key=sort_key), sorted(reversed_rows, key=sort_key))


@pytest.mark.slow
@pytest.mark.parametrize("metric", [*METRICS, "sinks"])
def test_the_order_of_texts_changes_no_interval(lens: HookedTransformer, metric: str) -> None:
    """Texts are resampled in an order that follows from their content."""
    texts = [*TEXTS, letters(12, 5), letters(7, 2)]
    forwards, backwards = (
        run(lens, ordered_texts, metrics=[metric], batch_tokens=1000)
        for ordered_texts in (texts, texts[::-1])
    )
    intervals = 0
    for table, content in forwards.metrics[metric].tables.items():
        columns = [column.name for column in content.spec.columns]
        if "text" not in columns:
            intervals += sum(column.endswith(("low", "high")) for column in columns)
            assert_same(content.records(), backwards.rows(metric, table).records())
    assert intervals >= 2


def sort_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("text", "layer", "head", "tensor"))


def assert_same(rows: list[dict[str, Any]], other_rows: list[dict[str, Any]]) -> None:
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        for name, value in row.items():
            if isinstance(value, float) and name != "entropy_error":
                assert other_row[name] == pytest.approx(value, rel=1e-9, abs=1e-10), (name, row)
            elif name != "entropy_error":
                assert other_row[name] == value, (name, row)


def test_float32_agrees_with_float64(result: Run) -> None:
    single = run(toy_lens("llama-gqa"))
    for metric in METRICS:
        for row, single_row in zip(texts_table(result, metric), texts_table(single, metric), strict=True):
            for name, value in row.items():
                if isinstance(value, float) and name != "entropy_error":
                    assert single_row[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (metric, name)


@pytest.mark.slow
@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_bad_weights_are_missing_with_a_reason_from_their_layer_on(bad_value: float) -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        lens.original_model.model.layers[1].mlp.down_proj.weight[3, 2] = bad_value
    result = run(lens)
    assert_no_failures(result)
    columns = {
        "bos-norm": "bos_norm",
        "compression": "entropy",
        "massive-activations": "ratio",
        "layer-balance": "share",
    }
    for metric, column in columns.items():
        for row in texts_table(result, metric):
            assert (row[column] is None) == (row["layer"] == 1), (metric, row)
        assert any(
            f"{metric}: " in warning and "NaN or infinite in layer 1" in warning
            for warning in result.warnings
        ), metric
    for metric in ("attention-patterns", "bos-write", "massive-values"):
        column = {"attention-patterns": "entropy", "bos-write": "write", "massive-values": "count_global"}[
            metric
        ]
        assert all(row[column] is not None for row in texts_table(result, metric)), (
            "attention precedes the MLP"
        )
    result.to_dict()


def test_one_token_texts_are_missing_with_a_reason() -> None:
    result = run(toy_lens("llama"), ["", letters(8)])
    assert_no_failures(result)
    columns = {
        "attention-patterns": "entropy",
        "bos-norm": "bos_ratio",
        "bos-write": "write",
        "compression": "entropy",
    }
    for metric, column in columns.items():
        missing = {row["text"]: row[column] is None for row in texts_table(result, metric)}
        assert missing == {"0": True, "1": False}, metric
        assert any(
            f"{metric}: " in warning and "fewer than two tokens" in warning for warning in result.warnings
        ), metric


def test_dead_activations_are_missing_with_a_reason() -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        for parameter in lens.original_model.parameters():
            parameter.zero_()
    result = run(lens)
    assert_no_failures(result)
    for metric, column in (
        ("compression", "entropy"), ("bos-norm", "bos_ratio"), ("massive-activations", "ratio"),
        ("layer-balance", "share"), ("bos-write", "true_share"), ("massive-values", "count_global"),
    ):  # fmt: skip
        assert all(row[column] is None for row in texts_table(result, metric)), metric
        assert any(f"{metric}: " in warning and "all zero" in warning for warning in result.warnings), metric
    assert all(row["entropy_normalised"] > 0.999999 for row in texts_table(result, "attention-patterns"))


@pytest.mark.parametrize(
    "family", mark_later_slow(["mistral", "gemma2", "gpt2", "gpt-neox", "qwen3", "cohere2", "gpt-oss"])
)
def test_other_families(family: str) -> None:
    """Sliding windows, softcaps, shared heads, partial or interleaved rotation, biases, norms after attention."""
    result = run(toy_lens(family))
    assert_no_failures(result)
    unrotated = {"gpt2": (0, 1), "cohere2": (1,)}.get(family, ())
    for row in texts_table(result, "massive-values"):
        if row["tensor"] == "q":
            assert (row["count_pairs"] is None) == (row["layer"] in unrotated)
    for row in texts_table(result, "attention-patterns"):
        assert 0 <= row["local"] <= 1
        assert row["entropy_normalised"] <= 1 + 1e-6


def test_everything_has_a_null_and_a_definition(result: Run) -> None:
    for metric in METRICS:
        metric_result = result.metrics[metric]
        assert metric_result.definition
        assert metric_result.metric.display is not None
        columns = [column.name for column in result.rows(metric, "layers").spec.columns]
        assert {"ci_low", "ci_high", "null"} <= set(columns), metric


def test_all_metrics_together_take_one_forward(
    lens: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    stream = type(lens).stream

    def counted(self: HookedTransformer, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(tuple(tokens.shape))
        return stream(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(lens), "stream", counted)
    run(lens, metrics=[*METRICS, "sinks"], batch_tokens=10_000)
    assert calls == [(3, 25)]


def test_stored_state_does_not_grow_with_the_length_of_texts(
    lens: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics store numbers by text, layer and head, and no activation."""
    from phaselens.plugin import plugins

    sizes: dict[int, dict[str, int]] = {}
    length = 0

    def record_size(metric: type[Metric[Any]]) -> None:
        compute = metric.compute

        def compute_and_size(self: Metric[Any]) -> Mapping[str, Table]:
            stored = self.per_text._values.values()
            sizes[length][self.name] = sum(
                value.nbytes for by_text_and_layer in stored for value in by_text_and_layer.values()
            )
            tensor_attributes = [
                name for name, value in vars(self).items() if isinstance(value, torch.Tensor)
            ]
            assert not tensor_attributes
            return compute(self)

        monkeypatch.setattr(metric, "compute", compute_and_size)

    for name in METRICS:
        record_size(plugins().metric(name))
    for length in (6, 60):
        sizes[length] = {}
        run(lens, [letters(length)])
    assert sizes[6] == sizes[60]
    assert set(sizes[6]) == set(METRICS)


@pytest.mark.parametrize(
    ("norms_of_bos", "layer"), [((5.0, 4.0, 3.0), None), ((5.0, 5.5, 7.5), 1), ((5.0, 4.0, 4.5), 1)]
)
def test_the_write_layer_is_missing_where_no_layer_adds_to_the_norm(
    norms_of_bos: tuple[float, ...], layer: int | None
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
    message = "write_layer is missing: no layer adds to the norm of position 0"
    assert (message in metric.warnings) == (layer is None)
