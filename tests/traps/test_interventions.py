"""Traps of interventions: the layer, edits that change nothing, chunks, and seeds as a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools.traps.bench import Bench
from tools.traps.dense import DenseModel
from tools.traps.interventions import (
    N_DECODED,
    TRAPS,
    d_over_texts,
    decoded_by_script,
    largest_ratio_layer_script,
    length_weighted_script,
    seeds_as_n_script,
    write_layer,
)

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import CausalMetric, Condition, Edit
from phaselens.runs import applied
from phaselens.uncertainty import compare_arms, compare_conditions
from tests.plugins.bos_models import SHRINKER, WRITER, bos_lens, bos_model
from tests.toys import letters
from tests.traps.benches import TEXTS, assert_told_apart, tiny_bench

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def planted() -> Bench:
    """A model in which the ratio is largest after a layer that writes nothing at position 0."""
    lens = bos_lens()
    lens.tokenizer = lens.text_tokenizer
    return Bench("planted", lens, DenseModel(bos_model()), TEXTS)


@pytest.fixture(scope="module")
def tiny() -> Bench:
    """A random model."""
    return tiny_bench("llama-gqa")


def trap(name: str, quantity: str = "") -> Any:
    (match,) = [trap for trap in TRAPS if trap.name == name and trap.quantity.startswith(quantity)]
    return match


def test_the_largest_ratio_is_not_where_the_spike_is_written(planted: Bench) -> None:
    assert (write_layer(planted), largest_ratio_layer_script(planted)) == (WRITER, SHRINKER)
    idle = trap("A layer that writes nothing")
    numbers = idle.measure(planted)
    assert numbers.script == 0.0
    assert_told_apart(idle, numbers, 0.4)


def test_a_hook_that_returns_nothing_changes_nothing_and_an_edit_that_returns_nothing_is_refused(
    planted: Bench,
) -> None:
    forgotten = trap("An edit that changes nothing")
    numbers = forgotten.measure(planted)
    assert numbers.script == 0.0
    assert_told_apart(forgotten, numbers, 0.4)
    tokens = torch.tensor([[0, 5, 7, 9]])
    for function in (lambda tensor, site: None, lambda tensor, site: tensor.zero_()):
        edit = Edit(f"blocks.{WRITER}.hook_mlp_out", function, positions=[0])
        with applied(planted.lens, [edit]), pytest.raises(InputError, match="return"):
            planted.lens.stream(tokens)


class Unchanging(CausalMetric):
    """A condition that returns the tensor as it was."""

    name, version = "unchanging", "1"

    def conditions(self) -> list[Condition]:
        return [Condition("as it was", [Edit("blocks.0.hook_mlp_out", lambda tensor, site: tensor.clone())])]


def test_a_condition_that_changes_no_value_fails(planted: Bench) -> None:
    run = phaselens.run(planted.lens, metrics=[Unchanging], texts=TEXTS)
    (failure,) = run.metrics["unchanging"].failures
    assert "changed no value" in str(failure)


def test_the_scripts_hook_edits_every_decoded_token_and_our_edit_one(tiny: Bench) -> None:
    n_tokens = 2 * N_DECODED
    bench = Bench("tiny", tiny.lens, tiny.dense, [letters(n_tokens)])
    assert decoded_by_script(bench, bench.ids(letters(n_tokens)))[1] == 1 + n_tokens + 1 - (n_tokens + 1) // 2
    for quantity, least_error in (("rows", 10), ("loss", 1e-3)):
        decoding = trap("Position 0 of the current chunk", quantity)
        assert_told_apart(decoding, decoding.measure(bench), least_error)


def test_seeds_as_a_sample_give_the_published_effect_size() -> None:
    published = json.loads((DATA / "goldens" / "disruption.json").read_text())["results"]
    for model in ("RoPE", "DroPE"):
        trials = published[model]["trials"]
        treated = np.array([trials[0]["massive_increase_pct"]])
        control = np.array([[trial["random_increase_pct"] for trial in trials]])
        expected = published[model]["stats"]["cohens_d"]
        assert seeds_as_n_script(treated, control) == pytest.approx(expected, rel=1e-6)
        ours = compare_arms(treated, control)
        assert (ours.n_texts, ours.n_seeds, ours.d_z, ours.p_value) == (1, 10, None, None)
        assert "d_z" in ours.reasons


def test_more_texts_raise_the_scripts_effect_size_and_not_ours() -> None:
    generator = np.random.default_rng(0)

    def effect_sizes(n_texts: int) -> tuple[float, float, float]:
        treated = 1 + generator.normal(size=n_texts)
        control = generator.normal(size=(n_texts, 10))
        d_z = compare_arms(treated, control, n_resamples=100, n_permutations=99).d_z
        assert d_z is not None
        return seeds_as_n_script(treated, control), d_z, d_over_texts(treated, control)

    few, many = effect_sizes(16), effect_sizes(1600)
    assert many[0] > 5 * few[0]
    assert 0.5 < many[1] < 1.2
    for sizes in (few, many):
        assert sizes[1] == pytest.approx(sizes[2], abs=1e-9)


def test_weights_of_all_tokens_give_the_wrong_perplexity_of_the_worked_example() -> None:
    fixture = json.loads((DATA / "unit_fixtures.json").read_text())["perplexity"]
    means, n_tokens = fixture["mean_loss_per_text"], fixture["T"]
    losses = [
        torch.full((n - 1,), mean, dtype=torch.float64) for mean, n in zip(means, n_tokens, strict=True)
    ]
    assert np.exp(length_weighted_script(losses)) == pytest.approx(fixture["ppl_weight_T"], rel=1e-12)
    (ours,) = compare_conditions(means, np.array(means)[:, None], [n - 1 for n in n_tokens], lengths=n_tokens)
    assert ours.ppl == pytest.approx(fixture["ppl_weight_T_minus_1"], rel=1e-12)
    assert ours.ppl_length_weighted == pytest.approx(fixture["ppl_weight_T"], rel=1e-12)


def test_the_last_token_changes_earlier_logits_without_a_mask_alone(tiny: Bench) -> None:
    ids = tiny.ids(letters(12))
    changed = [*ids[:-1], ids[-1] - 1]
    for is_causal in (True, False):
        with tiny.dense.changed(is_causal=is_causal):
            first, second = (tiny.dense.forward(tokens).logits[:-1] for tokens in (ids, changed))
        assert (float((first - second).abs().max()) > 0.1) is not is_causal
    first, second = (
        tiny.lens.stream(torch.tensor([tokens]), unembed=True)[0, :-1] for tokens in (ids, changed)
    )
    assert bool((first == second).all())
