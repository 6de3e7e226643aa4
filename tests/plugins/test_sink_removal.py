"""sink-removal: shifted scores of the sink against a dense softmax, planted truths, and its cost in kernel calls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import phaselens
from phaselens.testing import check_metric
from phaselens_plugins.sink_removal import SinkRemoval
from tests.marks import mark_later_slow
from tests.plugins.ablations import TEXTS, content, notes, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import READER, bos_lens, bos_model
from tests.toys import letters, toy_lens, toy_tokenizer

METRIC = "sink-removal"
ALONE = {"beside": False}


def shifted_logits(
    lens: Any, text: str, shift: float, key: int | None, layers: list[int], head: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits in float64 and targets of one text, with the scores of the matrix shifted."""
    ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])

    def shifted(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores = scores.clone()
        if key is not None:
            scores[:, slice(None) if head is None else head, key + 1 :, key] += shift
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", shifted) for layer in layers]
    return lens.stream(ids, hooks, unembed=True)[0, :-1].double(), ids[0, 1:]


def reference(lens: Any, shift: float, keys: Any, layers: list[int], head: int | None = None) -> Any:
    """Return the mean loss and the mean divergence from the unedited model, both [text]; `keys` is one, or by text."""
    losses, divergences = [], []
    for text in TEXTS:
        key = keys(text) if callable(keys) else keys
        logits, targets = shifted_logits(lens, text, shift, key, layers, head)
        unedited, _ = shifted_logits(lens, text, 0.0, key, layers, head)
        losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
        p, q = unedited.log_softmax(-1), logits.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
    return np.array(losses), np.array(divergences)


def weighted(values: np.ndarray, n: np.ndarray) -> float:
    return float((values * n).sum() / n.sum())


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gpt-oss", "gemma2", "mistral", "gpt2"]))
def test_every_dose_equals_a_dense_softmax_in_float64(family: str) -> None:
    from phaselens_plugins._doses import draw_other_key

    lens = toy_lens(family, dtype=torch.float64)
    n = predicted(lens)
    base, _ = reference(lens, 0.0, 0, [])
    result = run(SinkRemoval, lens, params={"at": "heads", "shifts": "-inf,-4,2", **ALONE})
    scopes: list[tuple[str, int | None, int | None]] = [("all layers", None, None), ("each layer", 1, None)]
    for layers, layer, head in [*scopes, ("each head", 0, 2)]:
        edited = [0, 1] if layer is None else [layer]
        for shift, text in ((-math.inf, "-inf"), (-4.0, "-4"), (2.0, "2")):
            (record,) = [
                dose
                for dose in rows(result, METRIC, "doses")
                if (dose["layers"], dose["layer"], dose["head"], dose["b"]) == (layers, layer, head, text)
            ]
            losses, divergences = reference(lens, shift, 0, edited, head)
            assert record["delta_nats"] == pytest.approx(weighted(losses - base, n), abs=1e-7)
            assert record["kl"] == pytest.approx(weighted(divergences, n), rel=1e-5)
            control, control_kl = reference(
                lens,
                shift,
                lambda text: draw_other_key(len(lens.text_tokenizer(text)["input_ids"]), content(text), 0, 0),
                edited,
                head,
            )
            assert record["control_nats"] == pytest.approx(weighted(control - base, n), abs=1e-7)
            assert record["control_kl"] == pytest.approx(weighted(control_kl, n), rel=1e-5, abs=1e-12)
            assert record["control_kl_low"] <= record["control_kl"] <= record["control_kl_high"]
            condition = row(result, METRIC, record["condition"], layer) if head is None else None
            if condition is not None:
                assert condition["ratio"] == pytest.approx(
                    perplexity(losses, n) / perplexity(base, n), rel=1e-7
                )


def test_the_other_key_is_one_that_a_predicting_query_sees() -> None:
    from phaselens_plugins._doses import draw_other_key

    for length in range(2, 9):
        for position in range(length):
            keys = {draw_other_key(length, f"text {seed}", seed, position) for seed in range(60)}
            # The last query predicts nothing, so the last two keys change no loss.
            candidates = set(range(1, length - 2)) - {position}
            assert keys == (candidates or set(range(1, length - 1)) - {position} or {None})


@pytest.mark.slow
def test_the_figure_has_the_sweeps_over_layers_and_heads() -> None:
    lens = toy_lens("llama-gqa")
    for at, n_panels in (("all", 1), ("layers", 2), ("heads", 3)):
        result = run(SinkRemoval, lens, params={"at": at, "shifts": "-inf,2", **ALONE})
        figure = Figure()
        SinkRemoval.plot(result.metrics[METRIC].tables, figure)
        assert len(figure.axes) == n_panels
    marks = figure.axes[2].lines[0]
    of_heads = [row for row in rows(result, METRIC, "doses") if row["layers"] == "each head"]
    of_heads = [row for row in of_heads if row["b"] == "-inf"]
    assert len(of_heads) == 2 * lens.info.n_heads
    assert list(marks.get_xdata()) == [row["mass"] for row in of_heads]
    assert list(marks.get_ydata()) == [row["delta_nats"] for row in of_heads]


def test_the_attention_before_the_edit_is_the_mean_over_later_queries() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    result = run(SinkRemoval, lens, params={"at": "layers", "shifts": "-inf", "sink_position": 2, **ALONE})
    means = []
    for text in TEXTS:
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        _, cache = lens.run_with_cache(ids, names_filter=lambda name: name == "blocks.1.attn.hook_pattern")
        if ids.shape[1] > 3:
            means.append(cache["blocks.1.attn.hook_pattern"][0, :, 3:, 2].mean().item())
    (record,) = [dose for dose in rows(result, METRIC, "doses") if dose["layer"] == 1]
    assert record["mass"] == pytest.approx(np.mean(means), abs=1e-12)


def test_a_shift_of_zero_is_the_unedited_model() -> None:
    result = run(SinkRemoval, toy_lens("llama-gqa"), params={"shifts": "-1,0", **ALONE})
    zero = [dose for dose in rows(result, METRIC, "doses") if dose["b"] == "0"]
    assert [(dose["delta_nats"], dose["ratio"], dose["kl"], dose["control_nats"]) for dose in zero] == [
        (0.0, 1.0, 0.0, 0.0)
    ]
    assert {record["condition"] for record in rows(result, METRIC)} == {
        "baseline", "all layers, b = -1", "other position: all layers, b = -1",
    }  # fmt: skip


def test_a_sink_that_only_the_reader_reads_gives_three_equal_answers() -> None:
    """Only position 0 has a value that is read, by uniform attention: taking the attention, the value, or the write
    that makes it are the same then, for all tokens but the one that position 0 itself predicts."""
    result = run(SinkRemoval, bos_lens(), params={"at": "layers", "shifts": "-inf", "seeds": 0})
    questions = {record["metric"]: record for record in rows(result, METRIC, "questions")}
    assert list(questions) == ["sink-removal", "bos-v", "bos-mlp"]
    assert questions["bos-v"]["ratio"] > 1.5
    later = {record["condition"]: record["delta_later"] for record in rows(result, METRIC, "reach")}
    expected = later[questions["bos-v"]["condition"]]
    for metric in ("sink-removal", "bos-mlp"):
        assert later[questions[metric]["condition"]] == pytest.approx(expected, rel=1e-9)
    ratios = {record["layer"]: record["ratio"] for record in rows(result, METRIC, "doses")}
    assert [ratios[layer] for layer in range(3)] == [1.0, 1.0, 1.0]
    assert ratios[READER] == ratios[None]


def deaf_lens() -> Any:
    """A lens in whose reader layer head 1 puts no attention on position 0: its score there is −1e5 or less."""
    model = bos_model()
    attention = model.model.layers[READER].self_attn
    with torch.no_grad():
        slowest = 8 + 3  # the dimension of head 1 that hardly turns within a text
        attention.q_proj.weight[slowest, 2] = 1e3  # CONTENT, of every token but BOS
        attention.k_proj.weight[slowest, 0] = -1e3  # START, of BOS alone
    lens = phaselens.load(model, label="deaf", check=False)
    lens.text_tokenizer = toy_tokenizer()
    return lens


@pytest.mark.slow
def test_a_head_without_attention_on_the_sink_has_nothing_to_remove() -> None:
    result = run(SinkRemoval, deaf_lens(), params={"at": "heads", "shifts": "-inf,-4,2", "seeds": 0, **ALONE})
    of_reader = [
        dose for dose in rows(result, METRIC, "doses") if dose["layer"] == READER and dose["head"] == 1
    ]
    assert [(dose["ratio"], dose["delta_low"], dose["kl"]) for dose in of_reader] == [(1.0, 0.0, 0.0)] * 3
    assert notes(result, f"nothing to remove in layer {READER}, head 1: no later query attends to position 0")
    others = [
        dose["ratio"]
        for dose in rows(result, METRIC, "doses")
        if dose["layer"] == READER and dose["head"] == 0
    ]
    assert min(abs(ratio - 1) for ratio in others) > 1e-4


@pytest.mark.slow
def test_every_shift_of_a_layer_shares_one_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from phaselens import attention

    calls: list[int] = []
    attend_without = attention.attend_without

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[0].shape[1])
        return attend_without(*args, **options)

    monkeypatch.setattr(attention, "attend_without", counted)
    lens = toy_lens("llama")
    texts = [letters(12)]
    run(SinkRemoval, lens, texts, params={"shifts": "-inf,-4,-2,-1,2", "layer": 1, "seeds": 0, **ALONE})
    # Layer 0 of all layers at once: one call; layer 1 then differs by shift: five; layer 1 alone: one.
    assert calls == [4] + [4] * 5 + [4]
    calls.clear()
    run(SinkRemoval, lens, texts, params={"at": "heads", "shifts": "-inf,-4,2", "seeds": 0, **ALONE})
    # One for each of the 8 heads; all heads of layer 0, shared by all layers at once and layer 0 alone; layer 1 of all
    # layers at once, which differs by shift; layer 1 alone.
    assert sorted(calls) == [1] * 8 + [4] * (1 + 3 + 1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"shifts": "-inf,x"}, "shifts: 'x' is neither a finite number nor -inf"),
        ({"shifts": "inf"}, "shifts: 'inf' is neither a finite number nor -inf"),
        ({"shifts": "nan"}, "shifts: 'nan' is neither a finite number nor -inf"),
        ({"head": 1}, "head is 1, but no layer is given"),
    ],
)
def test_parameters_that_say_nothing_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(phaselens.InputError, match=message):
        SinkRemoval.Params.parse(params)


def test_a_head_that_the_model_lacks_is_refused() -> None:
    metrics: Any = [(SinkRemoval, {"layer": 1, "head": 4})]
    result = phaselens.run(toy_lens("llama"), metrics=metrics, texts=[letters(4)])
    (failure,) = result.metrics[METRIC].failures
    assert failure.message == "head is 4, but llama has heads 0 to 3"


def test_another_sink_position_leaves_the_neighbours_out_by_name() -> None:
    result = run(SinkRemoval, toy_lens("llama"), params={"sink_position": 3, "shifts": "-inf"})
    assert [record["metric"] for record in rows(result, METRIC, "questions")] == [METRIC]
    assert notes(result, "questions has no rows of bos-v and bos-mlp", "the sink position is 3")


def test_a_model_whose_queries_see_only_themselves_has_nothing_to_remove() -> None:
    lens = toy_lens("mistral", sliding_window=1)
    result = run(SinkRemoval, lens, params={"shifts": "-inf"})
    assert rows(result, METRIC, "doses") == []
    assert notes(
        result, "nothing to remove in layer 0, 1: with a window of 1, no later query sees position 0"
    )


def test_texts_that_end_at_the_sink_have_nothing_to_remove() -> None:
    result = run(SinkRemoval, toy_lens("llama"), params={"shifts": "-inf", "sink_position": 40})
    assert rows(result, METRIC, "doses") == []
    assert notes(result, "nothing to remove: no text has a token after position 40")


def test_one_text_has_no_interval() -> None:
    result = run(SinkRemoval, toy_lens("llama"), [TEXTS[0]], params={"shifts": "-inf", **ALONE})
    (record,) = rows(result, METRIC, "doses")
    assert record["kl"] > 0
    assert (record["delta_low"], record["kl_low"]) == (None, None)


@pytest.mark.slow
def test_layers_without_attention_have_no_key_to_remove() -> None:
    from tests.lens.measured import model_of

    for model_type, layers in (("qwen3_next", [None, 1]), ("mamba", [])):
        lens = phaselens.load(model_of(model_type), label=model_type, check=False)
        lens.text_tokenizer = toy_tokenizer()
        result = run(SinkRemoval, lens, params={"at": "layers", "shifts": "-inf", "layer": 0})
        assert [dose["layer"] for dose in rows(result, METRIC, "doses")] == layers
        assert notes(result, "no key is removed", "layer 0 is")


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"at": "heads", "shifts": "-inf", "sink_position": 1}])
def test_the_metric_keeps_the_contract(params: dict[str, Any]) -> None:
    check_metric(SinkRemoval, params)
