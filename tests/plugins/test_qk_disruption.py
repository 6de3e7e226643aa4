"""qk-disruption against whole forwards of TransformerLens, planted truths, and likely mistakes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.plugin import Edit
from phaselens.runs import applied
from phaselens_plugins._cells import OverwriteCells
from phaselens_plugins.qk_disruption import QkDisruption, QkParams
from tests.marks import mark_later_slow
from tests.plugins.ablations import TEXTS, notes, row, rows, run
from tests.plugins.qk_models import (
    DIMENSION,
    HEAD,
    LAYER,
    ids_of,
    naive_loss,
    needle_lens,
    needle_texts,
    pooled,
    states,
    top_cells,
    write,
)
from tests.plugins.views import info, view
from tests.toys import toy_lens

NAME = "qk-disruption"
SIDES = {"post": ("hook_rot_q", "hook_rot_k"), "pre": ("hook_q", "hook_k")}


@pytest.fixture(scope="module")
def lens() -> Any:
    """Return a model with grouped queries: keys have half as many heads."""
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def needle() -> Any:
    return needle_lens()


@pytest.fixture(scope="module")
def result(needle: Any) -> Any:
    return run(NAME, needle, needle_texts())


def fold_of(texts: list[str], text: str) -> int:
    """Return the fold of a text: texts alternate between two folds in the order of their hashes."""
    ordered = sorted(set(texts), key=lambda content: hashlib.sha256(content.encode()).hexdigest())
    return ordered.index(text) % 2


def other_fold(texts: list[str], text: str) -> list[str]:
    """Return the texts that a text's cells are selected on."""
    return [other_text for other_text in texts if fold_of(texts, other_text) != fold_of(texts, text)]


def points_of(side: str) -> list[str]:
    return [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in SIDES[side]]


def text_losses(result: Any, condition: str, seed: int | None = None) -> np.ndarray:
    """Return the loss [text] in the run's order."""
    return np.array(
        [r["loss"] for r in rows(result, NAME, "texts") if (r["condition"], r["seed"]) == (condition, seed)]
    )


# --- planted truths


def test_the_one_cell_that_matters_is_selected_and_costs_the_whole_loss(needle: Any, result: Any) -> None:
    massive = [r for r in rows(result, NAME, "dimensions") if r["condition"] == "massive"]
    assert {(r["layer"], r["tensor"]): r["n_cells"] for r in massive} == {
        (0, "q"): 0, (0, "k"): 0, (LAYER, "q"): 1, (LAYER, "k"): 1,
    }  # fmt: skip
    assert row(result, NAME, "massive")["delta_nats"] > 2
    assert row(result, NAME, "top-1")["delta_nats"] > 2
    for control in ("random-count", "top-1-random", "smallest"):
        assert abs(row(result, NAME, control)["delta_nats"]) < 1e-3, control
    metric = QkDisruption(needle.info, QkParams())
    for text, loss in zip(needle_texts(), text_losses(result, "massive"), strict=True):
        cell = np.zeros((4, 8), bool)
        cell[HEAD, DIMENSION] = True
        hooks = [(f"blocks.{LAYER}.{point}", write(cell)) for point in metric.points.values()]
        assert loss == pytest.approx(naive_loss(needle, text, hooks), abs=1e-9)


def test_contrasts_hold_massive_minus_random_text_by_text(result: Any) -> None:
    contrast = next(r for r in rows(result, NAME, "contrasts") if r["control"] == "random-count")
    seeds = [text_losses(result, "random-count", seed) for seed in range(3)]
    n = np.array([len(text.split()) for text in needle_texts()])
    difference = text_losses(result, "massive") - np.mean(seeds, axis=0)
    assert contrast["condition"] == "massive"
    assert contrast["delta_nats"] == pytest.approx((difference * n).sum() / n.sum(), rel=1e-9)
    assert contrast["ci_low"] > 2
    assert (contrast["n_texts"], contrast["n_seeds"]) == (4, 3)


def test_more_seeds_are_not_more_evidence(needle: Any, result: Any) -> None:
    """The massive arm is deterministic: ten copies of it are one, and n is the number of texts."""
    many_result = run(NAME, needle, needle_texts(), params={"seeds": 9})
    for name in ("massive", "top-1", "smallest"):
        few_seeds, more_seeds = row(result, NAME, name), row(many_result, NAME, name)
        assert few_seeds == more_seeds
        assert few_seeds["n_seeds"] == 1
        assert few_seeds["n_texts"] == 4
    for contrast in rows(many_result, NAME, "contrasts"):
        assert contrast["n_texts"] == 4
        # Four texts have 16 sign patterns: repeats cannot make p smaller than 2 / 16.
        assert contrast["p_value"] >= 2 / 16


# --- against whole forwards


@pytest.mark.slow
@pytest.mark.parametrize("side", ["post", "pre"])
@pytest.mark.parametrize("operation", mark_later_slow(["top-1", "top-1-mean", "smallest", "massive"], 2))
def test_losses_equal_those_of_whole_forwards(lens: Any, side: str, operation: str) -> None:
    params = {"conditions": operation, "rotation": side, "multiple": 1.6}
    measured = text_losses(run(NAME, lens, params=params, batch_tokens=60), operation)
    points = points_of(side)
    clean = {text: states(lens, text, points) for text in TEXTS}
    for text, loss in zip(TEXTS, measured, strict=True):
        selection_states = [clean[other_text] for other_text in other_fold(TEXTS, text)]
        hooks = []
        for point in points:
            norms = pooled(selection_states, point)
            assert norms.shape == ((4, 8) if point.endswith("q") else (2, 8))
            cells = {
                "massive": norms > 1.6 * norms.mean(), "smallest": top_cells(-norms),
            }.get(operation, top_cells(norms))  # fmt: skip
            means = (
                np.concatenate([text_states[point] for text_states in selection_states]).mean(0)
                if operation == "top-1-mean"
                else None
            )
            hooks.append((point, write(cells, means)))
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)


def test_edits_before_and_after_the_rotation_differ(lens: Any) -> None:
    """Zeroing dimension i before the rotation removes a mixture of i and its partner after it."""
    post, pre = (
        run(NAME, lens, params={"conditions": "top-1", "rotation": side}) for side in ("post", "pre")
    )
    assert np.abs(text_losses(post, "top-1") - text_losses(pre, "top-1")).min() > 1e-3
    assert (text_losses(post, "baseline") == text_losses(pre, "baseline")).all()


def test_without_a_rotation_both_sides_are_equal() -> None:
    nope = toy_lens("llama-drope-nope", dtype=torch.float64)
    post, pre = (run(NAME, nope, params={"rotation": side}) for side in ("post", "pre"))
    assert rows(post, NAME) == rows(pre, NAME)


@pytest.mark.parametrize("tensors", ["q", "k"])
def test_queries_or_keys_alone(lens: Any, tensors: str) -> None:
    measured = run(NAME, lens, params={"conditions": "top-1", "tensors": tensors})
    points = [point for point in points_of("post") if point.endswith(tensors)]
    clean = {text: states(lens, text, points) for text in TEXTS}
    for text, loss in zip(TEXTS, text_losses(measured, "top-1"), strict=True):
        selection_states = [clean[other_text] for other_text in other_fold(TEXTS, text)]
        hooks = [(point, write(top_cells(pooled(selection_states, point)))) for point in points]
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)


def test_the_studys_rule_selects_the_largest_cell_of_a_head_if_massive_in_it(lens: Any) -> None:
    params = {"conditions": "study-top-1", "rotation": "pre", "multiple": 1.3}
    measured = run(NAME, lens, params=params)
    points = points_of("pre")
    clean = {text: states(lens, text, points) for text in TEXTS}
    n_cells = 0
    for text, loss in zip(TEXTS, text_losses(measured, "study-top-1"), strict=True):
        selection_states = [clean[other_text] for other_text in other_fold(TEXTS, text)]
        hooks = []
        for point in points:
            norms = pooled(selection_states, point)
            cells = top_cells(norms) & (norms > 1.3 * norms.mean(-1, keepdims=True))
            n_cells += int(cells.sum())
            hooks.append(
                (
                    point,
                    write(
                        cells,
                        np.concatenate([text_states[point] for text_states in selection_states]).mean(0),
                    ),
                )
            )
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)
    assert 0 < n_cells < len(TEXTS) * 2 * (4 + 2)


# --- texts that cells are selected on


def test_cells_come_neither_from_the_text_nor_a_disturbed_pass_nor_the_first_row(lens: Any) -> None:
    """Each alternative would select other cells in this model, so equality with whole forwards rules it out."""
    points = points_of("post")
    clean = {text: states(lens, text, points) for text in TEXTS}
    expected = {
        text: [top_cells(pooled([clean[o] for o in other_fold(TEXTS, text)], p)) for p in points]
        for text in TEXTS
    }
    own_cells = {text: [top_cells(pooled([clean[text]], point)) for point in points] for text in TEXTS}
    first_row = [top_cells(pooled([clean[TEXTS[0]]], point)) for point in points]
    disturbed = {}
    for text in TEXTS:
        hooks = [(point, write(cells)) for point, cells in zip(points[:2], expected[text][:2], strict=True)]
        upper_states = states(lens, text, points[2:], hooks)
        disturbed[text] = [top_cells(pooled([upper_states], point)) for point in points[2:]]
    for wrong_cells in (
        own_cells,
        dict.fromkeys(TEXTS, first_row),
        {t: [*expected[t][:2], *disturbed[t]] for t in TEXTS},
    ):
        losses = np.array(
            [
                naive_loss(lens, t, [(p, write(c)) for p, c in zip(points, wrong_cells[t], strict=True)])
                for t in TEXTS
            ]
        )
        measured = text_losses(run(NAME, lens, params={"conditions": "top-1"}), "top-1")
        assert np.abs(losses - measured).max() > 1e-4


def metric_fed_with(by_text: dict[str, np.ndarray], **params: Any) -> QkDisruption:
    """Return the metric after one layer of texts with these queries and keys [pos, head, d_head], by id."""
    metric = QkDisruption(info(n_heads=2, d_head=4), QkParams(**params))
    states = torch.from_numpy(np.stack(list(by_text.values())))
    metric.update(view({"attn.hook_rot_q": states, "attn.hook_rot_k": states}, (3,) * len(by_text)))
    return metric


def overwritten_cells(metric: QkDisruption, condition: str, text: str) -> np.ndarray:
    """Cells of queries [head, d_head] that are overwritten in a text."""
    edit = next(
        condition_match for condition_match in metric.conditions() if condition_match.name == condition
    ).edits[0]
    assert isinstance(edit.to, OverwriteCells)
    return edit.to.cells[edit.to.fold_of[text]]


def test_a_text_does_not_select_its_own_cells() -> None:
    plain = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    by_text = dict(zip("abcd", plain, strict=True))
    expected = {text: overwritten_cells(metric_fed_with(by_text), "top-1", text) for text in by_text}
    for text in by_text:
        changed = {**by_text, text: by_text[text] * np.array([1e6, 1, 1, 1])}
        assert (overwritten_cells(metric_fed_with(changed), "top-1", text) == expected[text]).all()
        assert any(
            (overwritten_cells(metric_fed_with(changed), "top-1", other_text) != expected[other_text]).any()
            for other_text in by_text
        )


def test_a_text_and_its_copy_do_not_select_for_each_other(lens: Any) -> None:
    result = run(NAME, lens, [TEXTS[0], TEXTS[0]])
    assert notes(result, "two texts")
    assert {r["condition"] for r in rows(result, NAME)} == {"baseline"}
    assert rows(result, NAME, "dimensions") == []


def test_one_text_is_missing_with_the_reason(lens: Any) -> None:
    result = run(NAME, lens, [TEXTS[0]])
    assert {r["condition"] for r in rows(result, NAME)} == {"baseline"}
    assert notes(result, "selected on texts other than those")


def test_pads_do_not_select() -> None:
    states = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    padded = np.concatenate([states, np.full((4, 2, 2, 4), np.nan)], axis=1)
    unpadded_metric, padded_metric = (
        metric_fed_with(dict(zip("abcd", states, strict=True))),
        metric_fed_with(dict(zip("abcd", padded, strict=True))),
    )
    for text in "abcd":
        assert (
            overwritten_cells(unpadded_metric, "top-1", text)
            == overwritten_cells(padded_metric, "top-1", text)
        ).all()


def test_a_text_with_nan_does_not_select_and_gives_a_warning() -> None:
    states = np.random.default_rng(0).standard_normal((5, 3, 2, 4))
    clean = metric_fed_with(dict(zip("abcd", states, strict=False)))
    states[4, 1, 0, 0] = np.nan
    metric = metric_fed_with(dict(zip("abcde", states, strict=True)))
    assert (overwritten_cells(metric, "top-1", "a") == overwritten_cells(clean, "top-1", "a")).all()
    assert any("NaN" in warning for warning in metric.warnings)


# --- nothing to overwrite


def test_without_a_massive_cell_the_largest_are_overwritten_with_a_warning(lens: Any) -> None:
    result = run(NAME, lens, params={"multiple": 50})
    names = {r["condition"] for r in rows(result, NAME)}
    assert names == {"baseline", "top-1", "smallest", "top-1-random", "top-1-norm", "top-1-mean"}
    controls = "massive is left out, with its controls random-count, random-norm"
    assert notes(result, controls, "50 × the mean", "the largest is")
    massive = [r for r in rows(result, NAME, "dimensions") if r["condition"] == "massive"]
    assert len(massive) == 2 * 2 * 2
    assert all(r["n_cells"] == 0 and r["norm_share"] == 0 for r in massive)


def test_a_mask_without_cells_leaves_logits_bit_for_bit(lens: Any) -> None:
    no_cells = OverwriteCells(np.zeros((3, 4, 8), bool), {})
    edit = Edit("blocks.0.attn.hook_rot_q", no_cells)
    ids = ids_of(lens, TEXTS[0])
    with torch.no_grad():
        unedited = lens.stream(ids, unembed=True)
        with applied(lens, [edit]) as effects:
            edited = lens.stream(ids, unembed=True)
    assert torch.equal(unedited, edited)
    assert not effects["blocks.0.attn.hook_rot_q"].changed


def test_texts_of_a_fold_without_massive_cells_equal_the_baseline_bit_for_bit(lens: Any) -> None:
    """The threshold lies between the largest cells of the two folds: only one of them has a massive one."""
    points = points_of("post")
    clean = {text: states(lens, text, points) for text in TEXTS}
    largest = {}
    for text in TEXTS:
        norms = [
            pooled([clean[other_text] for other_text in other_fold(TEXTS, text)], point) for point in points
        ]
        largest[fold_of(TEXTS, text)] = max(
            float(point_norms.max() / point_norms.mean()) for point_norms in norms
        )
    result = run(NAME, lens, params={"conditions": "massive", "multiple": sum(largest.values()) / 2})
    base, edited = text_losses(result, "baseline"), text_losses(result, "massive")
    for index, text in enumerate(TEXTS):
        has_massive = largest[fold_of(TEXTS, text)] == max(largest.values())
        assert (base[index] != edited[index]) == has_massive


def test_cells_that_are_already_zero_are_left_out() -> None:
    """A condition of such cells is left out by name, and such a layer beside others is left out of the edits."""
    lens = toy_lens("llama", dtype=torch.float64)
    with torch.no_grad():
        for layer in lens.original_model.model.layers[:1]:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.view(4, 8, -1)[:, [2, 6]] = 0.0
    result = run(NAME, lens, params={"conditions": "smallest"})
    assert row(result, NAME, "smallest")["ratio"] != 1
    with torch.no_grad():
        for projection in (lens.original_model.model.layers[1].self_attn.q_proj,
                           lens.original_model.model.layers[1].self_attn.k_proj):  # fmt: skip
            projection.weight.view(4, 8, -1)[:, [2, 6]] = 0.0
    result = run(NAME, lens, params={"conditions": "smallest"})
    assert notes(result, "smallest is left out", "zero in every text")


def test_merged_halves_select_like_one_metric() -> None:
    states = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    unsplit = metric_fed_with(dict(zip("abcd", states, strict=True)))
    halves = metric_fed_with(dict(zip("ab", states[:2], strict=True)))
    second_half = QkDisruption(info(n_heads=2, d_head=4), QkParams())
    second_view = view({f"attn.hook_rot_{t}": torch.from_numpy(states[2:]) for t in "qk"}, (3, 3))
    renamed = type(second_view.batch)(("c", "d"), (2, 3), (3, 3), second_view.batch.tokens)
    second_half.update(type(second_view)(0, renamed, second_view.activations))
    halves.merge(second_half)
    for text in "abcd":
        assert (overwritten_cells(halves, "top-1", text) == overwritten_cells(unsplit, "top-1", text)).all()
