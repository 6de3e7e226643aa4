"""Queries and keys overwritten: against whole forwards of TransformerLens, where the truth is known, and every trap."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.plugin import Edit
from phaselens.runs.interventions import applied
from phaselens_plugins._cells import Overwrite
from phaselens_plugins.qk_disruption import QkDisruption, QkParams
from tests.marks import first_quick
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
    """Grouped queries: keys have half as many heads."""
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def needle() -> Any:
    return needle_lens()


@pytest.fixture(scope="module")
def found(needle: Any) -> Any:
    return run(NAME, needle, needle_texts())


def fold_of(texts: list[str], text: str) -> int:
    """Texts in the order of their hashes, dealt alternately."""
    ordered = sorted(set(texts), key=lambda one: hashlib.sha256(one.encode()).hexdigest())
    return ordered.index(text) % 2


def others(texts: list[str], text: str) -> list[str]:
    return [one for one in texts if fold_of(texts, one) != fold_of(texts, text)]


def points_of(side: str) -> list[str]:
    return [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in SIDES[side]]


def text_losses(found: Any, condition: str, seed: int | None = None) -> np.ndarray:
    """Loss [text] in the run's order."""
    return np.array(
        [r["loss"] for r in rows(found, NAME, "texts") if (r["condition"], r["seed"]) == (condition, seed)]
    )


# --- the truth is known


def test_the_one_cell_that_is_needed_is_found_and_its_loss_is_all_the_loss(needle: Any, found: Any) -> None:
    massive = [r for r in rows(found, NAME, "dimensions") if r["condition"] == "massive"]
    assert {(r["layer"], r["tensor"]): r["n_cells"] for r in massive} == {
        (0, "q"): 0, (0, "k"): 0, (LAYER, "q"): 1, (LAYER, "k"): 1,
    }  # fmt: skip
    assert row(found, NAME, "massive")["delta_nats"] > 2
    assert row(found, NAME, "top-1")["delta_nats"] > 2
    for control in ("random-count", "top-1-random", "smallest"):
        assert abs(row(found, NAME, control)["delta_nats"]) < 1e-3, control
    metric = QkDisruption(needle.info, QkParams())
    for text, loss in zip(needle_texts(), text_losses(found, "massive"), strict=True):
        cell = np.zeros((4, 8), bool)
        cell[HEAD, DIMENSION] = True
        hooks = [(f"blocks.{LAYER}.{point}", write(cell)) for point in metric.points.values()]
        assert loss == pytest.approx(naive_loss(needle, text, hooks), abs=1e-9)


def test_massive_less_random_stands_in_contrasts_text_by_text(found: Any) -> None:
    contrast = next(r for r in rows(found, NAME, "contrasts") if r["control"] == "random-count")
    seeds = [text_losses(found, "random-count", seed) for seed in range(3)]
    n = np.array([len(text.split()) for text in needle_texts()])
    difference = text_losses(found, "massive") - np.mean(seeds, axis=0)
    assert contrast["condition"] == "massive"
    assert contrast["delta_nats"] == pytest.approx((difference * n).sum() / n.sum(), rel=1e-9)
    assert contrast["ci_low"] > 2
    assert (contrast["n_texts"], contrast["n_seeds"]) == (4, 3)


def test_more_seeds_are_no_more_evidence(needle: Any, found: Any) -> None:
    """The massive arm is the same every time: ten copies of it are one, and n is the number of texts."""
    many = run(NAME, needle, needle_texts(), params={"seeds": 9})
    for name in ("massive", "top-1", "smallest"):
        one, other = row(found, NAME, name), row(many, NAME, name)
        assert one == other
        assert one["n_seeds"] == 1
        assert one["n_texts"] == 4
    for contrast in rows(many, NAME, "contrasts"):
        assert contrast["n_texts"] == 4
        # Of four texts' signs there are 16: no repetition can make p smaller than 2 / 16.
        assert contrast["p_value"] >= 2 / 16


# --- against the slow way


@pytest.mark.parametrize("side", ["post", "pre"])
@pytest.mark.parametrize("operation", first_quick(["top-1", "top-1-mean", "smallest", "massive"], 2))
def test_losses_equal_those_of_whole_forwards(lens: Any, side: str, operation: str) -> None:
    params = {"conditions": operation, "rotation": side, "multiple": 1.6}
    measured = text_losses(run(NAME, lens, params=params, batch_tokens=60), operation)
    points = points_of(side)
    clean = {text: states(lens, text, points) for text in TEXTS}
    for text, loss in zip(TEXTS, measured, strict=True):
        seen = [clean[other] for other in others(TEXTS, text)]
        hooks = []
        for point in points:
            norms = pooled(seen, point)
            assert norms.shape == ((4, 8) if point.endswith("q") else (2, 8))
            cells = {
                "massive": norms > 1.6 * norms.mean(), "smallest": top_cells(-norms),
            }.get(operation, top_cells(norms))  # fmt: skip
            means = (
                np.concatenate([one[point] for one in seen]).mean(0) if operation == "top-1-mean" else None
            )
            hooks.append((point, write(cells, means)))
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)


def test_before_and_after_the_rotation_are_two_operations(lens: Any) -> None:
    """Zeroing dimension i before it removes a mixture of i and its partner after it."""
    post, pre = (
        run(NAME, lens, params={"conditions": "top-1", "rotation": side}) for side in ("post", "pre")
    )
    assert np.abs(text_losses(post, "top-1") - text_losses(pre, "top-1")).min() > 1e-3
    assert (text_losses(post, "baseline") == text_losses(pre, "baseline")).all()


def test_without_a_rotation_there_is_no_difference() -> None:
    nope = toy_lens("llama-drope-nope", dtype=torch.float64)
    post, pre = (run(NAME, nope, params={"rotation": side}) for side in ("post", "pre"))
    assert rows(post, NAME) == rows(pre, NAME)


@pytest.mark.parametrize("tensors", ["q", "k"])
def test_queries_or_keys_alone(lens: Any, tensors: str) -> None:
    measured = run(NAME, lens, params={"conditions": "top-1", "tensors": tensors})
    points = [point for point in points_of("post") if point.endswith(tensors)]
    clean = {text: states(lens, text, points) for text in TEXTS}
    for text, loss in zip(TEXTS, text_losses(measured, "top-1"), strict=True):
        seen = [clean[other] for other in others(TEXTS, text)]
        hooks = [(point, write(top_cells(pooled(seen, point)))) for point in points]
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)


def test_the_study_s_rule_takes_the_largest_of_a_head_only_over_its_head_s_mean(lens: Any) -> None:
    params = {"conditions": "study-top-1", "rotation": "pre", "multiple": 1.3}
    measured = run(NAME, lens, params=params)
    points = points_of("pre")
    clean = {text: states(lens, text, points) for text in TEXTS}
    n_taken = 0
    for text, loss in zip(TEXTS, text_losses(measured, "study-top-1"), strict=True):
        seen = [clean[other] for other in others(TEXTS, text)]
        hooks = []
        for point in points:
            norms = pooled(seen, point)
            cells = top_cells(norms) & (norms > 1.3 * norms.mean(-1, keepdims=True))
            n_taken += int(cells.sum())
            hooks.append((point, write(cells, np.concatenate([one[point] for one in seen]).mean(0))))
        assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-6)
    assert 0 < n_taken < len(TEXTS) * 2 * (4 + 2)


# --- where cells come from


def test_neither_the_text_s_own_nor_a_disturbed_pass_nor_the_batch_s_first_row_chooses(lens: Any) -> None:
    """Each of these would choose other cells in this model, so the equality with the slow way rules them out."""
    points = points_of("post")
    clean = {text: states(lens, text, points) for text in TEXTS}
    right = {
        text: [top_cells(pooled([clean[o] for o in others(TEXTS, text)], p)) for p in points]
        for text in TEXTS
    }
    own = {text: [top_cells(pooled([clean[text]], point)) for point in points] for text in TEXTS}
    first_row = [top_cells(pooled([clean[TEXTS[0]]], point)) for point in points]
    disturbed = {}
    for text in TEXTS:
        hooks = [(point, write(cells)) for point, cells in zip(points[:2], right[text][:2], strict=True)]
        above = states(lens, text, points[2:], hooks)
        disturbed[text] = [top_cells(pooled([above], point)) for point in points[2:]]
    for trap in (
        own,
        dict.fromkeys(TEXTS, first_row),
        {t: [*right[t][:2], *disturbed[t]] for t in TEXTS},
    ):
        wrong = np.array(
            [
                naive_loss(lens, t, [(p, write(c)) for p, c in zip(points, trap[t], strict=True)])
                for t in TEXTS
            ]
        )
        measured = text_losses(run(NAME, lens, params={"conditions": "top-1"}), "top-1")
        assert np.abs(wrong - measured).max() > 1e-4


def fed(by_text: dict[str, np.ndarray], **params: Any) -> QkDisruption:
    """The metric after one layer of texts whose queries and keys [pos, head, d_head] are given, by id."""
    metric = QkDisruption(info(n_heads=2, d_head=4), QkParams(**params))
    states = torch.from_numpy(np.stack(list(by_text.values())))
    metric.update(view({"attn.hook_rot_q": states, "attn.hook_rot_k": states}, (3,) * len(by_text)))
    return metric


def chosen(metric: QkDisruption, condition: str, text: str) -> np.ndarray:
    """Cells of queries [head, d_head] that are overwritten in a text."""
    edit = next(one for one in metric.conditions() if one.name == condition).edits[0]
    assert isinstance(edit.to, Overwrite)
    return edit.to.cells[edit.to.folds[text]]


def test_a_text_s_own_values_never_choose_its_cells() -> None:
    plain = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    by_text = dict(zip("abcd", plain, strict=True))
    before = {text: chosen(fed(by_text), "top-1", text) for text in by_text}
    for text in by_text:
        changed = {**by_text, text: by_text[text] * np.array([1e6, 1, 1, 1])}
        assert (chosen(fed(changed), "top-1", text) == before[text]).all()
        assert any((chosen(fed(changed), "top-1", other) != before[other]).any() for other in by_text)


def test_a_text_and_its_copy_do_not_choose_for_each_other(lens: Any) -> None:
    two = run(NAME, lens, [TEXTS[0], TEXTS[0]])
    assert notes(two, "two texts")
    assert {r["condition"] for r in rows(two, NAME)} == {"baseline"}
    assert rows(two, NAME, "dimensions") == []


def test_one_text_is_null_with_the_reason(lens: Any) -> None:
    one = run(NAME, lens, [TEXTS[0]])
    assert {r["condition"] for r in rows(one, NAME)} == {"baseline"}
    assert notes(one, "chosen on other texts")


def test_pads_choose_nothing() -> None:
    states = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    padded = np.concatenate([states, np.full((4, 2, 2, 4), np.nan)], axis=1)
    one, two = fed(dict(zip("abcd", states, strict=True))), fed(dict(zip("abcd", padded, strict=True)))
    for text in "abcd":
        assert (chosen(one, "top-1", text) == chosen(two, "top-1", text)).all()


def test_a_text_with_nan_chooses_nothing_and_is_named() -> None:
    states = np.random.default_rng(0).standard_normal((5, 3, 2, 4))
    clean = fed(dict(zip("abcd", states, strict=False)))
    states[4, 1, 0, 0] = np.nan
    metric = fed(dict(zip("abcde", states, strict=True)))
    assert (chosen(metric, "top-1", "a") == chosen(clean, "top-1", "a")).all()
    assert any("NaN" in warning for warning in metric.warnings)


# --- what is not there


def test_no_massive_cell_is_said_and_the_largest_are_tried_anyway(lens: Any) -> None:
    nothing = run(NAME, lens, params={"multiple": 50})
    names = {r["condition"] for r in rows(nothing, NAME)}
    assert names == {"baseline", "top-1", "smallest", "top-1-random", "top-1-norm", "top-1-mean"}
    controls = "massive is left out, with its controls random-count, random-norm"
    assert notes(nothing, controls, "50 × the mean", "the largest is")
    massive = [r for r in rows(nothing, NAME, "dimensions") if r["condition"] == "massive"]
    assert len(massive) == 2 * 2 * 2
    assert all(r["n_cells"] == 0 and r["norm_share"] == 0 for r in massive)


def test_a_mask_without_a_cell_leaves_logits_bit_for_bit(lens: Any) -> None:
    nothing = Overwrite(np.zeros((3, 4, 8), bool), {})
    edit = Edit("blocks.0.attn.hook_rot_q", nothing)
    ids = ids_of(lens, TEXTS[0])
    with torch.no_grad():
        plain = lens.stream(ids, unembed=True)
        with applied(lens, [edit]) as proofs:
            edited = lens.stream(ids, unembed=True)
    assert torch.equal(plain, edited)
    assert not proofs["blocks.0.attn.hook_rot_q"].changed


def test_where_a_fold_has_no_massive_cell_its_texts_are_the_baseline_bit_for_bit(lens: Any) -> None:
    """The threshold lies between the largest cells of the two folds: only one of them has a massive one."""
    points = points_of("post")
    clean = {text: states(lens, text, points) for text in TEXTS}
    largest = {}
    for text in TEXTS:
        norms = [pooled([clean[other] for other in others(TEXTS, text)], point) for point in points]
        largest[fold_of(TEXTS, text)] = max(float(one.max() / one.mean()) for one in norms)
    found = run(NAME, lens, params={"conditions": "massive", "multiple": sum(largest.values()) / 2})
    base, after = text_losses(found, "baseline"), text_losses(found, "massive")
    for place, text in enumerate(TEXTS):
        has_one = largest[fold_of(TEXTS, text)] == max(largest.values())
        assert (base[place] != after[place]) == has_one


def test_cells_that_are_zero_already_are_no_experiment() -> None:
    """Left out by name, as is a layer of them beside others that are not."""
    lens = toy_lens("llama", dtype=torch.float64)
    with torch.no_grad():
        for layer in lens.original_model.model.layers[:1]:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.view(4, 8, -1)[:, [2, 6]] = 0.0
    found = run(NAME, lens, params={"conditions": "smallest"})
    assert row(found, NAME, "smallest")["ratio"] != 1
    with torch.no_grad():
        for projection in (lens.original_model.model.layers[1].self_attn.q_proj,
                           lens.original_model.model.layers[1].self_attn.k_proj):  # fmt: skip
            projection.weight.view(4, 8, -1)[:, [2, 6]] = 0.0
    found = run(NAME, lens, params={"conditions": "smallest"})
    assert notes(found, "smallest is left out", "zero in every text")


def test_merged_halves_choose_as_one() -> None:
    states = np.random.default_rng(0).standard_normal((4, 3, 2, 4))
    whole = fed(dict(zip("abcd", states, strict=True)))
    halves = fed(dict(zip("ab", states[:2], strict=True)))
    rest = QkDisruption(info(n_heads=2, d_head=4), QkParams())
    second = view({f"attn.hook_rot_{t}": torch.from_numpy(states[2:]) for t in "qk"}, (3, 3))
    renamed = type(second.batch)(("c", "d"), (2, 3), (3, 3), second.batch.tokens)
    rest.update(type(second)(0, renamed, second.activations))
    halves.merge(rest)
    for text in "abcd":
        assert (chosen(halves, "top-1", text) == chosen(whole, "top-1", text)).all()
