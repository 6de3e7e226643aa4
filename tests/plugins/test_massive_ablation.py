"""massive-ablation against whole forwards of TransformerLens, planted truths, matched controls, and hostile texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import Site
from phaselens.testing import Planted, check_metric, plant
from phaselens_plugins._massive_moments import BOS, OTHER, Criterion, MassiveMoments
from phaselens_plugins._massive_plan import (
    COUNT,
    MASSIVE,
    NORM,
    NORM_EVERYWHERE,
    FoldEdit,
    MassivePlan,
    OverwriteCoordinates,
)
from phaselens_plugins.massive_ablation import MassiveAblation
from tests.plugins.ablations import notes, row, rows, run
from tests.plugins.qk_models import naive_loss
from tests.plugins.views import view
from tests.toys import letters, toy_lens

NAME = "massive-ablation"
MORE_TEXTS = ["to be or not", "that is it", "to sleep"]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fold_of(texts: list[str], text: str) -> int:
    """Return the fold of a text: texts alternate between two folds in the order of their hashes."""
    return sorted({hashed(other_text) for other_text in texts}).index(hashed(text)) % 2


def residual(lens: Any, text: str, layer: int) -> torch.Tensor:
    collected: list[torch.Tensor] = []
    ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
    lens.stream(ids, [(f"blocks.{layer}.hook_resid_post", lambda x, hook: collected.append(x[0].clone()))])
    return collected[0]


def text_losses(result: Any, condition: str, seed: int | None = None) -> list[float]:
    return [
        r["loss"] for r in rows(result, NAME, "texts") if (r["condition"], r["seed"]) == (condition, seed)
    ]


def overwrite(select: Callable[[torch.Tensor], torch.Tensor], value: Any = 0.0) -> Any:
    """Return a TransformerLens hook that writes `value` where `select` of the text's residual is True."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(select(tensor[0])[None], torch.as_tensor(value, dtype=tensor.dtype), tensor)

    return hook


# --- planted truths


@pytest.fixture(scope="module")
def first_token() -> Planted:
    return plant("massive token")


def test_the_planted_coordinate_is_overwritten_and_nothing_else(first_token: Planted) -> None:
    texts = [first_token.text, *MORE_TEXTS]
    result = run(NAME, first_token.lens, texts)
    coordinates = [(r["layer"], r["tokens"], r["dimension"]) for r in rows(result, NAME, "coordinates")]
    assert coordinates == [(0, BOS, first_token.dimension)] * 2
    for record in rows(result, NAME, "coordinates"):
        assert (record["value"], record["mean"], record["share"]) == (pytest.approx(1e3), 0.0, 1.0)

    def planted_cell(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[0, first_token.dimension] = True
        return mask

    hook = ("blocks.0.hook_resid_post", overwrite(planted_cell))
    for condition in ("massive := 0", "massive := mean"):  # the mean of the dimension is 0 elsewhere
        for text, loss in zip(texts, text_losses(result, condition), strict=True):
            assert loss == pytest.approx(naive_loss(first_token.lens, text, [hook]), abs=1e-12)
    assert row(result, NAME, "massive := 0")["delta_nats"] > 0
    assert abs(row(result, NAME, "random, same number := 0")["delta_nats"]) < 0.001
    contrast = next(r for r in rows(result, NAME, "contrasts") if r["condition"] == "massive := 0")
    assert contrast["control"] == "random, same number := 0"


def test_controls_of_equal_norm_are_left_out_where_nothing_else_has_that_norm(first_token: Planted) -> None:
    result = run(NAME, first_token.lens, [first_token.text, *MORE_TEXTS])
    for name, tokens in (("same norm :=", "the same tokens"), ("same norm, all tokens :=", "all tokens")):
        (note,) = notes(
            result, f"random, {name} 0 is left out", "in layer 0", f"all other dimensions of {tokens}"
        )
        assert "times the squared norm of the massive coordinates" in note


def test_a_massive_token_elsewhere_is_found_in_each_text_where_it_is() -> None:
    planted = plant("sink at position 7")
    texts = [planted.text, "to be Z or", "Z to", "be", "oh Z Z"]
    result = run(NAME, planted.lens, texts, params={"ratio": 100, "seeds": 1})
    coordinates = rows(result, NAME, "coordinates")
    assert {(r["layer"], r["tokens"], r["dimension"]) for r in coordinates} == {(0, OTHER, planted.dimension)}

    def marks(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[1:, planted.dimension] = x[1:, planted.dimension].abs() > 100
        return mask

    hook = ("blocks.0.hook_resid_post", overwrite(marks))
    for text, loss in zip(texts, text_losses(result, "massive := 0"), strict=True):
        assert loss == pytest.approx(naive_loss(planted.lens, text, [hook]), abs=1e-12)
    baseline = text_losses(result, "baseline")
    assert text_losses(result, "massive := 0")[3] == baseline[3]  # "be" has no such token


def test_a_coordinate_that_only_the_tested_text_has_is_not_its_own() -> None:
    planted = plant("sink at position 7")
    texts = ["to be Z or", "be", "oh no"]
    params = {"ratio": 100, "seeds": 0}
    result = phaselens.run(planted.lens, metrics=[(NAME, params)], texts=texts)
    assert notes(result, f"the texts of fold {fold_of(texts, texts[0])} are not edited")
    (failure,) = result.metrics[NAME].failures
    assert "no condition had an effect: massive := 0: its edit of blocks.0.hook_resid_post changed" in str(
        failure
    )


# --- against a dense reference


def test_selection_and_losses_equal_a_dense_computation() -> None:
    """A loose criterion on a random model selects many coordinates; each fold's come from the other's texts."""
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    texts = [letters(9), letters(24, 3), letters(15, 11), letters(12, 5)]
    params = {"threshold": 0.2, "ratio": 2.8, "seeds": 1, "min_share": 0.5}
    result = run(NAME, lens, texts, params=params)
    x = {(text, layer): residual(lens, text, layer) for text in texts for layer in range(2)}
    masks = {key: (v.abs() > 0.2) & (v.abs() >= 2.8 * np.median(v.abs().numpy())) for key, v in x.items()}
    expected: dict[tuple[int, str, int], int] = {}
    means: dict[tuple[int, int, int], float] = {}
    for fold in range(2):
        selection = [text for text in texts if fold_of(texts, text) != fold]
        for layer in range(2):
            for tokens, chosen in ((BOS, slice(0, 1)), (OTHER, slice(1, None))):
                share = (
                    torch.stack([masks[text, layer][chosen].any(0) for text in selection]).double().mean(0)
                )
                for dimension in (share >= 0.5).nonzero()[:, 0].tolist():
                    expected.setdefault((fold, tokens, dimension), layer)
            plain = torch.cat([x[text, layer][~masks[text, layer].any(1)] for text in selection]).mean(0)
            means |= {(fold, layer, dimension): float(mean) for dimension, mean in enumerate(plain)}
    table = rows(result, NAME, "coordinates")
    assert {(r["fold"], r["tokens"], r["dimension"]): r["layer"] for r in table} == expected
    assert {r["layer"] for r in table} == {0, 1}
    for record in table:
        assert record["mean"] == pytest.approx(means[record["fold"], record["layer"], record["dimension"]])
    for condition in ("massive := 0", "massive := mean"):
        for text, loss in zip(texts, text_losses(result, condition), strict=True):
            fold, hooks = fold_of(texts, text), []
            for layer in range(2):

                def select(x: torch.Tensor, fold: int = fold, layer: int = layer) -> torch.Tensor:
                    massive = (x.abs() > 0.2) & (x.abs() >= 2.8 * np.median(x.abs().numpy()))
                    mask = torch.zeros_like(x, dtype=torch.bool)
                    for (coordinate_fold, tokens, dimension), first_layer in expected.items():
                        if (coordinate_fold, first_layer) == (fold, layer):
                            if tokens == BOS:
                                mask[0, dimension] = True
                            else:
                                mask[1:, dimension] = massive[1:, dimension]
                    return mask

                values = [0.0 if condition.endswith("0") else means[fold, layer, d] for d in range(32)]
                hooks.append((f"blocks.{layer}.hook_resid_post", overwrite(select, values)))
            assert loss == pytest.approx(naive_loss(lens, text, hooks), abs=1e-10), condition


# --- controls


def plan_of(
    n_texts: int = 6, n_tokens: int = 30, d: int = 64, size: float = 40.0, **options: Any
) -> MassivePlan:
    """Return the plan of texts with planted coordinates: 3 and 7 at position 0, 9 at positions 5 and 11."""
    moments = MassiveMoments()
    for index in range(n_texts):
        x = torch.randn(n_tokens, d, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        x[0, [3, 7]] = size
        x[[5, 11], 9] = -size
        layer = view({"hook_resid_post": x[None]}, (n_tokens,))
        batch = replace(layer.batch, hashes=(f"{index:02d}",))
        moments.add(replace(layer, batch=batch), Criterion(10.0, 10.0))
    plan = MassivePlan.split(moments, 2, 0.0, options.get("seed", 0))
    assert plan is not None
    return plan


def test_controls_of_equal_number_edit_other_dimensions_of_the_same_tokens() -> None:
    plan = plan_of()
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x[[5, 11], 9] = 40.0
    criterion = Criterion(10.0, 10.0)
    treated = plan.edits(0, MASSIVE)[0].mask(x, criterion)
    assert treated.nonzero().tolist() == [[0, 3], [0, 7], [5, 9], [11, 9]]
    drawn = set()
    for repeat in range(5):
        control = plan.edits(0, COUNT, repeat)[0].mask(x, criterion)
        assert control.sum(1).tolist() == treated.sum(1).tolist()
        assert not control[:, [3, 7, 9]].any()
        drawn.add(tuple(control.nonzero()[:, 1].tolist()))
    assert len(drawn) == 5
    assert plan.edits(0, COUNT, 3) == plan.edits(0, COUNT, 3)


@pytest.mark.parametrize(("what", "d"), [(NORM, 512), (NORM_EVERYWHERE, 64)])
def test_controls_of_equal_norm_have_it_on_the_texts_they_are_selected_on(what: str, d: int) -> None:
    plan = plan_of(d=d, size=12.0)
    assert plan.reason_to_skip(what, 3) == ""
    for repeat in range(3):
        for fold, edit in enumerate(plan.edits(0, what, repeat)):
            contents = plan.selection(fold)
            treated, edited = plan.treated_square(contents, fold, 0), plan.edited_square(contents, 0, edit)
            assert edited == pytest.approx(treated, rel=0.03)
            assert not {3, 7, 9} & {*edit.bos, *edit.rows, *edit.everywhere}


def test_a_control_that_cannot_be_drawn_says_why() -> None:
    plan = plan_of(d=10)
    assert plan.reason_to_skip(COUNT, 1) == ""
    assert "in layer 0, all other dimensions of the same tokens have" in plan.reason_to_skip(NORM, 1)
    crowded = plan_of(d=10)
    crowded.__dict__["_massive"] = set(range(8))
    assert crowded.reason_to_skip(COUNT, 1) == "3 dimensions are massive, and only 2 are not"


def test_the_table_of_edits_has_the_norms_of_the_edited_texts() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    texts = [letters(9), letters(24, 3), letters(15, 11), letters(12, 5)]
    result = run(NAME, lens, texts, params={"threshold": 0.2, "ratio": 2.8, "seeds": 2})
    coordinates = rows(result, NAME, "coordinates")
    for record in rows(result, NAME, "edited"):
        if record["condition"] != "massive := 0":
            continue
        square = 0.0
        members = [text for text in texts if fold_of(texts, text) == record["fold"]]
        for text in members:
            x = residual(lens, text, record["layer"])
            massive = (x.abs() > 0.2) & (x.abs() >= 2.8 * np.median(x.abs().numpy()))
            for entry in coordinates:
                if (entry["fold"], entry["layer"]) == (record["fold"], record["layer"]):
                    column = x[:, entry["dimension"]]
                    chosen = (
                        column[:1] if entry["tokens"] == BOS else column[1:][massive[1:, entry["dimension"]]]
                    )
                    square += float(chosen.square().sum())
        assert record["norm"] == pytest.approx((square / len(members)) ** 0.5)
        assert record["of_treated"] in (1.0, None)


# --- hostile input


def test_without_a_massive_coordinate_the_note_says_how_far_the_texts_are_from_it() -> None:
    result = run(NAME, toy_lens())
    (note,) = notes(result, "no condition is run: no coordinate is massive")
    assert "The largest ratio is" in note
    assert "-P massive-ablation.ratio" in note
    assert [r["condition"] for r in rows(result, NAME)] == ["baseline"]
    assert rows(result, NAME, "coordinates") == rows(result, NAME, "edited") == []


def test_one_text_has_no_others_to_select_on(first_token: Planted) -> None:
    result = run(NAME, first_token.lens, ["to be", "to be"])
    assert notes(result, "use two texts of different content or more")


def test_a_text_that_is_not_finite_selects_nothing_and_is_run() -> None:
    planted = plant("massive token")
    with torch.no_grad():
        planted.lens.original_model.get_input_embeddings().weight[20] = torch.nan
    bad = next(
        c for c in "abcdefghijklmnopqrstuvwxyz" if planted.lens.text_tokenizer(c)["input_ids"][-1] == 20
    )
    result = run(NAME, planted.lens, ["to be", "or no", bad + " o"], params={"seeds": 1})
    assert notes(result, "in 1 texts residuals are NaN or infinite")
    assert {r["dimension"] for r in rows(result, NAME, "coordinates")} == {planted.dimension}


def test_an_edit_without_texts_is_refused_by_name() -> None:
    edit = OverwriteCoordinates([FoldEdit(bos=(0,))], {}, Criterion(1.0, 1.0))
    site = Site("blocks.0.hook_resid_post", 0, torch.arange(3)[None])
    with pytest.raises(LookupError, match="massive coordinates are those of a whole text"):
        edit(torch.zeros(1, 3, 4), site)


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(MassiveAblation)
    check_metric(MassiveAblation, {"threshold": 0.3, "ratio": 2.5, "seeds": 1})
