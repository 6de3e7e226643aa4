"""Counts of massive pairs, the pairs that the model's own rotation mixes, against plain float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import phaselens
from phaselens.testing import tiny_model
from tests.lens.test_rotation_pairs import CASES, halves, made, rope
from tests.plugins.views import info, rows, view
from tests.toys import letters, toy_tokenizer

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

TEXTS = [letters(9), letters(20, 3)]
MULTIPLE = 1.2


def run_of(lens: HookedTransformer) -> phaselens.Run:
    lens.text_tokenizer = toy_tokenizer()
    return phaselens.run(lens, metrics=[("massive-values", {"multiple": MULTIPLE})], texts=TEXTS)


def dense_norms(lens: HookedTransformer, text: str, point: str) -> np.ndarray:
    """Return the norms over tokens of a text's states, [head, d_head], from a forward of that text alone."""
    states: list[torch.Tensor] = []
    ids = torch.tensor([toy_tokenizer()(text)["input_ids"]])
    lens.stream(ids, [(point, lambda value, hook: states.append(value[0]))])
    return states[0].double().square().sum(0).sqrt().numpy()


CHECKED_CASES = (
    "llama",
    "norms of queries and keys",
    "norms over all heads",
    "a part of the head",
    "phi-2",
    "phi-4-mini",
    "cohere",
    "yarn",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED_CASES)
def test_count_share_and_null_are_over_the_pairs_that_are_mixed(name: str) -> None:
    build, pairs = CASES[name]
    lens = phaselens.load(build().to(torch.float64), label=name, check=False)
    run = run_of(lens)
    assert not run.failed
    points = {"q": "hook_rot_q", "k": "hook_rot_k", "q_pre": "hook_q", "k_pre": "hook_k"}
    first_dims, second_dims = np.array(pairs).T
    total = 0
    for row in run.rows("massive-values", "texts").records():
        if row["tensor"] == "v":
            assert row["count_pairs"] is row["fraction_pairs"] is row["null_pairs"] is None
            continue
        norms = dense_norms(
            lens, TEXTS[int(row["text"])], f"blocks.{row['layer']}.attn.{points[row['tensor']]}"
        )
        pair_norms = np.hypot(norms[:, first_dims], norms[:, second_dims])
        count = (pair_norms > MULTIPLE * pair_norms.mean()).sum()
        assert row["count_pairs"] == count
        assert row["fraction_pairs"] == pytest.approx(count / pair_norms.size)
        assert 0 <= row["null_pairs"] < pair_norms.size
        total += count
    assert total > 0
    definitions = run.rows("massive-values", "definitions").records()
    assert all(
        row["null"] is not None
        for row in definitions
        if row["definition"] == "pairs" and row["tensor"] != "v"
    )
    assert not any("count_pairs" in warning for warning in run.warnings)


def test_the_factor_of_the_rotation_changes_no_count() -> None:
    """YaRN scales whole queries and keys; longrope scales only the dimensions that it rotates."""
    for name in ("yarn", "phi-4-mini"):
        lens = phaselens.load(CASES[name][0]().to(torch.float64), check=False)
        counts = {
            (row["text"], row["layer"], row["tensor"]): row["count_pairs"]
            for row in run_of(lens).rows("massive-values", "texts").records()
        }
        for (text, layer, tensor), count in counts.items():
            if tensor in ("q", "k"):
                assert count == counts[text, layer, f"{tensor}_pre"], "no norm is applied between them"


def test_slow_pairs_of_a_large_base_are_paired_on_short_texts() -> None:
    lens = phaselens.load(made("cohere", hidden_size=256, rope_parameters=rope(theta=8e6)), check=False)
    for row in run_of(lens).rows("massive-values", "texts").records():
        if row["tensor"] == "q":
            assert row["fraction_pairs"] == pytest.approx(row["count_pairs"] / (4 * 32))


@pytest.mark.slow
def test_layers_without_rotation_have_no_pairs_and_the_true_reason() -> None:
    lens = phaselens.load(tiny_model("smollm3"))
    run = run_of(lens)
    for row in run.rows("massive-values", "texts").records():
        is_missing = row["layer"] == 1 or row["tensor"] == "v"
        assert (row["count_pairs"] is None) == is_missing
        assert (row["null_pairs"] is None) == is_missing
    assert any(
        "count_pairs is missing in layer 1: queries and keys are not rotated there" in warning
        for warning in run.warnings
    )
    gpt2_run = run_of(phaselens.load(tiny_model("gpt2")))
    assert any(
        "missing in layer 0, 1: queries and keys are not rotated there" in warning
        for warning in gpt2_run.warnings
    )


@pytest.mark.slow
def test_a_model_and_its_copy_without_rotation_are_counted_on_the_same_pairs() -> None:
    """Projected queries and keys of layer 0 are equal in both models, so their pairs must be, too."""
    counts = []
    for positions in ("auto", "nope"):
        lens = phaselens.load(tiny_model("gpt-neox"), positions=positions)
        counts.append(
            {
                (row["text"], row["tensor"]): row["count_pairs"]
                for row in run_of(lens).rows("massive-values", "texts").records()
                if row["layer"] == 0
            }
        )
    assert counts[0] == counts[1]
    assert all(count is not None for (_, tensor), count in counts[0].items() if tensor != "v")
    drope_run = run_of(phaselens.load(tiny_model("llama-drope-qk-norm-nope")))
    assert not any("count_pairs" in warning for warning in drope_run.warnings)


def test_unrotated_dimensions_are_in_no_pair() -> None:
    """A huge unrotated dimension is a massive cell and does not enter the mean over pairs."""
    from phaselens.plugin import RotatedPairs
    from phaselens_plugins.massive_values import MassiveValues

    states = torch.ones(1, 6, 2, 8, dtype=torch.float64)
    states[0, :, 0, 1] = 100.0
    states[0, :, 1, 7] = 1e6
    points = ("hook_rot_q", "hook_rot_k", "hook_v", "hook_q", "hook_k")
    model = info(d_head=8, rotations=(RotatedPairs(halves(4), 8),))
    metric = MassiveValues(model, MassiveValues.Params())
    metric.update(view({f"attn.{point}": states for point in points}, (6,)))
    (row,) = (row for row in rows(metric, "texts") if row["tensor"] == "q")
    assert (row["count_global"], row["count_pairs"], row["fraction_pairs"]) == (1, 0, 0)
    metric = MassiveValues(model, MassiveValues.Params(multiple=3.0))
    metric.update(view({f"attn.{point}": states for point in points}, (6,)))
    (row,) = (row for row in rows(metric, "texts") if row["tensor"] == "q")
    assert (row["count_pairs"], row["fraction_pairs"]) == (1, 0.25)


def test_pairs_that_are_all_zero_are_missing_with_a_warning() -> None:
    from phaselens.plugin import RotatedPairs
    from phaselens_plugins.massive_values import MassiveValues

    states = torch.ones(1, 6, 2, 8, dtype=torch.float64)
    states[..., :4] = 0.0
    points = ("hook_rot_q", "hook_rot_k", "hook_v", "hook_q", "hook_k")
    metric = MassiveValues(info(d_head=8, rotations=(RotatedPairs(halves(4), 8),)), MassiveValues.Params())
    metric.update(view({f"attn.{point}": states for point in points}, (6,)))
    assert {row["count_pairs"] for row in rows(metric, "texts")} == {None}
    assert any(
        "the dimensions that the rotation mixes are all zero" in warning for warning in metric.warnings
    )


def test_a_rotation_that_could_not_be_read_is_named() -> None:
    from phaselens.plugin import RotatedPairs
    from phaselens_plugins.massive_values import MassiveValues

    unreadable = RotatedPairs((), 4, "the rotation mixes more than pairs of dimensions")
    metric = MassiveValues(info(rotations=(unreadable,)), MassiveValues.Params())
    points = ("hook_rot_q", "hook_rot_k", "hook_v", "hook_q", "hook_k")
    metric.update(view({f"attn.{point}": torch.ones(1, 6, 2, 4) for point in points}, (6,)))
    assert {row["count_pairs"] for row in rows(metric, "texts")} == {None}
    assert "count_pairs is missing in layer 0: the rotation could not be read: the rotation mixes" in str(
        metric.warnings
    )
