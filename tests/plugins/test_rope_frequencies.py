"""Use of rotary frequencies against plain numpy, with planted pairs, unrotated copies and hostile input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import phaselens
from phaselens.lens.checks import capture
from phaselens.plugin import RotatedPairs
from phaselens.testing import check_metric
from phaselens_plugins._frequency_tables import bands_of
from phaselens_plugins.rope_frequencies import RopeFrequencies
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (11, 29, 17)]


def rows_of(run: Any, table: str) -> list[dict[str, Any]]:
    assert not run.failed, run.metrics["rope-frequencies"].failures
    return run.rows("rope-frequencies", table).records()


def states_of(lens: Any, text: str, *points: str) -> dict[tuple[int, str], np.ndarray]:
    ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
    names = {
        (layer, point): f"blocks.{layer}.attn.{point}"
        for layer in range(lens.info.n_layers)
        for point in points
    }
    return {key: value[0].double().numpy() for key, value in capture(lens, ids, names)[1].items()}


def pair_norms(states: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return the mean norm over tokens [head, pair]."""
    return np.stack([np.hypot(states[..., low], states[..., high]).mean(0) for low, high in pairs], -1)


@pytest.mark.parametrize(
    "family", mark_later_slow(["llama-gqa", "gpt-neox", "cohere2", "gemma3", "gpt-oss"], 2)
)
def test_use_of_pairs_equals_numpys(family: str) -> None:
    lens = toy_lens(family)
    run = phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS, batch_tokens=64)
    measured, by_head = rows_of(run, "measured"), rows_of(run, "texts")
    assert measured
    for number, text in enumerate(TEXTS):
        states = states_of(lens, text, "hook_rot_q", "hook_rot_k")
        for layer, rotation in enumerate(lens.info.rotations):
            rows = [row for row in measured if row["text"] == str(number) and row["layer"] == layer]
            if rotation is None:
                assert rows == []
                continue
            q, k = (pair_norms(states[layer, f"hook_rot_{tensor}"], rotation.pairs) for tensor in "qk")
            products = q * np.repeat(k, len(q) // len(k), axis=0)
            use = products / products.sum(-1, keepdims=True)
            assert [row["use"] for row in rows] == pytest.approx(use.mean(0).tolist(), rel=1e-5)
            assert [row["q_norm"] for row in rows] == pytest.approx(q.mean(0).tolist(), rel=1e-5)
            assert [row["k_norm"] for row in rows] == pytest.approx(k.mean(0).tolist(), rel=1e-5)
            assert sum(row["score"] for row in rows) == pytest.approx(1.0)
            low = [index for index, band in enumerate(bands_of(rotation, 128)) if band == "low"]
            shares = [row for row in by_head if row["text"] == str(number) and row["layer"] == layer]
            assert [row["low"] for row in shares] == pytest.approx(use[:, low].sum(-1).tolist(), rel=1e-5)
            assert all(row["null"] == pytest.approx(len(low) / len(rotation.pairs)) for row in shares)
            assert all(row["low"] + row["middle"] + row["high"] == pytest.approx(1.0) for row in shares)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt-neox"])
def test_the_rotation_keeps_the_norm_of_each_pair(family: str) -> None:
    lens = toy_lens(family)
    points = ("hook_q", "hook_rot_q", "hook_k", "hook_rot_k")
    states = states_of(lens, TEXTS[1], *points)
    for layer, rotation in enumerate(lens.info.rotations):
        for tensor in "qk":
            before, after = (
                pair_norms(states[layer, point], rotation.pairs)
                for point in (f"hook_{tensor}", f"hook_rot_{tensor}")
            )
            np.testing.assert_allclose(after, before, rtol=1e-5)


def test_scores_of_all_pairs_of_tokens_agree_with_the_sampled_ones() -> None:
    lens = toy_lens("mistral")
    run = phaselens.run(lens, metrics=("rope-frequencies", {"samples": 40_000}), texts=[TEXTS[2]])
    states = states_of(lens, TEXTS[2], "hook_rot_q", "hook_rot_k")
    n, window = 18, lens.info.windows[0]
    weights = np.array(
        [[float(max(0, query + 1 - window) <= key <= query) for key in range(n)] for query in range(n)]
    )
    weights /= weights.sum(-1, keepdims=True)  # a query is drawn first, then a key that it sees
    for layer, rotation in enumerate(lens.info.rotations):
        q, k = states[layer, "hook_rot_q"], np.repeat(states[layer, "hook_rot_k"], 2, axis=1)
        sizes = []
        for low, high in rotation.pairs:
            products = np.einsum("qh,kh->hqk", q[..., low], k[..., low])
            products += np.einsum("qh,kh->hqk", q[..., high], k[..., high])
            sizes.append((np.abs(products) * weights).sum((1, 2)))
        shares = np.stack(sizes, -1)
        expected = (shares / shares.sum(-1, keepdims=True)).mean(0)
        rows = [row for row in rows_of(run, "measured") if row["layer"] == layer]
        assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=0.01)


def test_a_planted_pair_is_the_only_one_in_use() -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        attention = lens.original_model.model.layers[1].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            mask = torch.zeros(4, 8, 1)
            mask[:, [3, 7]] = 1.0  # the slowest pair, which turns once in 6,283 positions
            projection.weight *= mask.view(32, 1)
    run = phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS)
    pairs = [row for row in rows_of(run, "pairs") if row["layer"] == 1]
    assert [row["use"] for row in pairs] == pytest.approx([0.0, 0.0, 0.0, 1.0])
    assert [row["score"] for row in pairs] == pytest.approx([0.0, 0.0, 0.0, 1.0])
    assert [row["band"] for row in pairs] == ["high", "middle", "low", "low"]
    assert pairs[3]["period"] == pytest.approx(2000 * np.pi)
    layer = rows_of(run, "layers")[1]
    assert (layer["low"], layer["null"], layer["middle"]) == (pytest.approx(1.0), 0.5, pytest.approx(0.0))


def test_massive_cells_are_counted_in_the_band_of_their_pair() -> None:
    lens = toy_lens("llama")
    with torch.no_grad():
        for layer in lens.original_model.model.layers:
            layer.self_attn.q_proj.weight[6] *= 300.0
    run = phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS)
    rows = {
        (row["layer"], row["tensor"], row["band"]): row
        for row in rows_of(run, "massive")
        if row["layer"] == 0
    }
    # Dimension 6 is turned with dimension 2, in the third pair.
    assert rows[0, "q", "low"]["cells"] >= 1
    assert rows[0, "q", "low"]["share"] == 1.0
    assert (rows[0, "q", "high"]["cells"], rows[0, "k", "low"]["cells"]) == (0.0, 0.0)
    assert rows[0, "q", "low"]["share_null"] == 0.5
    assert rows[0, "q", "low"]["null"] < 1e-6


@pytest.mark.slow
def test_unrotated_copies_have_the_same_pairs_and_the_label() -> None:
    rotated, nulled = toy_lens("llama", label="rotated"), toy_lens("llama", label="nulled")
    nulled.set_rotation(nulled=True)
    dropped = toy_lens("llama-drope-nope", label="dropped", num_key_value_heads=4)
    run = phaselens.run([rotated, nulled, dropped], metrics="rope-frequencies", texts=TEXTS)
    labels = ("rotated", "nulled", "dropped")
    pairs = {label: [row for row in rows_of(run, "pairs") if row["model"] == label] for label in labels}
    assert {row["rotation"] for row in pairs["rotated"]} == {"rotated"}
    for label in ("nulled", "dropped"):
        assert {row["rotation"] for row in pairs[label]} == {"unrotated"}
        assert [row["band"] for row in pairs[label]] == [row["band"] for row in pairs["rotated"]]
    # The first layer's queries and keys do not depend on the rotation, so neither do its pairs' norms.
    for one_row, other_row in zip(pairs["rotated"][:4], pairs["nulled"][:4], strict=True):
        assert one_row["use"] == pytest.approx(other_row["use"], rel=1e-6)


@pytest.mark.slow
def test_layers_and_models_without_pairs_are_missing_with_the_reason() -> None:
    mixed = phaselens.run(toy_lens("smollm3"), metrics="rope-frequencies", texts=TEXTS)
    assert [row["low"] is None for row in rows_of(mixed, "layers")] == [False, True]
    assert any("layer 1: queries and keys are not rotated there" in text for text in mixed.warnings)
    learned = phaselens.run(toy_lens("gpt2"), metrics="rope-frequencies", texts=TEXTS)
    assert rows_of(learned, "pairs") == []
    assert any("layer 0, 1: queries and keys are not rotated" in text for text in learned.warnings)
    lens = toy_lens("llama")
    with torch.no_grad():
        lens.original_model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    broken = phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS)
    assert any("NaN or infinite in layer 1" in text for text in broken.warnings)
    assert bands_of(RotatedPairs(((0, 1),), 2), 128) == [None]


def test_a_texts_scores_do_not_depend_on_its_neighbours() -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    rows_alone = rows_of(phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS[1:2]), "measured")
    all_rows = rows_of(phaselens.run(lens, metrics="rope-frequencies", texts=TEXTS), "measured")
    beside = [row for row in all_rows if row["text"] == "1"]
    assert [row["score"] for row in beside] == pytest.approx([row["score"] for row in rows_alone], rel=1e-12)


@pytest.mark.slow
def test_the_figure_has_each_pair_by_its_period() -> None:
    lenses = [toy_lens("llama"), toy_lens("llama-drope-nope"), toy_lens("gpt2")]
    run = phaselens.run(lenses, metrics="rope-frequencies", texts=TEXTS)
    figure = Figure()
    RopeFrequencies.plot(run.metrics["rope-frequencies"].tables, figure)
    panel = figure.axes[0]
    names = [text.get_text() for text in panel.get_legend().get_texts()]
    assert names == ["llama", "llama-drope-nope, unrotated", "gpt2"]
    pairs = [row for row in rows_of(run, "pairs") if row["model"] == "llama"]
    periods = sorted({row["period"] for row in pairs})
    use = [np.mean([row["use"] for row in pairs if row["period"] == period]) for period in periods]
    line = next(line for line in panel.lines if line.get_label() == "llama")
    assert list(line.get_xdata()) == pytest.approx(periods)
    assert list(line.get_ydata()) == pytest.approx(use)


@pytest.mark.slow
def test_the_contract() -> None:
    check_metric(RopeFrequencies, {"samples": 8})
