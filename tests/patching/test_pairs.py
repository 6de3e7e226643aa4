"""Many pairs of prompts: each cell is the mean of the pairs' own sweeps, with the interval over pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from phaselens.errors import InputError
from phaselens.patching import Experiment, Experiments, logit_diff, loss, prompt
from phaselens.runs import Observer
from phaselens.uncertainty import mean_interval
from tests.patching.conftest import lens_of

CLEAN, CORRUPT = ("to be or", "to go or", "so be it"), ("to do or", "to be or", "so do it")


def experiments_of(clean=CLEAN, corrupt=CORRUPT, metric=None) -> Experiments:
    lens = lens_of("llama")
    texts = [[prompt(lens, text) for text in side] for side in (clean, corrupt)]
    return Experiments(*texts, metric or logit_diff(lens, "e", "o"))


@pytest.fixture
def experiments() -> Iterator[Experiments]:
    made = experiments_of()
    yield made
    while made.patched():
        made.undo()


@pytest.mark.parametrize("verb", ["sweep", "attribution"])
def test_cells_are_means_over_pairs_with_intervals(experiments: Experiments, verb: str) -> None:
    experiments.ablate("blocks.1.hook_mlp_out", pos=-1)
    result = getattr(experiments, verb)("head")
    single = [getattr(experiments[number], verb)("head").effect for number in range(3)]
    mean, low, high = mean_interval(np.stack(single))
    assert np.allclose(result.effect, mean)
    assert np.array_equal(result.low, low)
    assert np.array_equal(result.high, high)
    records = result.to_table().records()
    assert (records[0]["ci_low"], records[0]["n_pairs"]) == (low[0, 0], 3)
    assert "mean over 3 pairs" in str(result)


def test_positions_need_pairs_of_one_length_and_heads_do_not() -> None:
    mixed = experiments_of(("to be or", "to be"), ("to do or", "to do"))
    assert mixed.sweep("head").n_pairs == 2
    with pytest.raises(
        InputError, match="the pairs have 6 and 9 tokens, so their positions do not correspond"
    ):
        mixed.sweep("resid")
    assert experiments_of().sweep("resid").clean_words[1:3] == ("…", "'o'")


def test_a_run_has_each_arm_and_the_effect_of_the_edits(experiments: Experiments) -> None:
    experiments.patch("blocks.2.hook_resid_pre")
    values = experiments.run().values
    assert np.allclose(values[:, 1], values[:, 2])
    assert experiments.run().to_table().records()[3]["value"] == pytest.approx(
        float((values[:, 1] - values[:, 0]).mean())
    )
    lens = lens_of("llama")
    metrics = [logit_diff(lens, a, "o") for a in "ebt"]
    own = experiments_of(metric=metrics)
    assert own.run().metric == "logit_diff, one for each pair"
    assert own.run().values[1, 0] == pytest.approx(
        Experiment(own[1].clean, own[1].corrupt, metrics[1]).run().value[0]
    )
    losses = experiments_of(metric=loss).run().values
    assert losses[0, 2] == pytest.approx(Experiment(own[0].clean).run().loss[0])


def test_an_edit_that_one_pair_refuses_is_made_in_none() -> None:
    mixed = experiments_of(("to be or", "to be"), ("to do or", "to do"))
    with pytest.raises(InputError, match="pair 1: "):
        mixed.ablate("blocks.1.hook_mlp_out", pos=7)
    assert len(mixed[0].patched()) == 0
    with pytest.raises(InputError, match="there is no edit to undo"):
        mixed.undo()


def test_the_rotation_is_one_switch_for_all_pairs(experiments: Experiments) -> None:
    experiments.null_rope(1)
    assert set(experiments[0].lens.nulled_layers) == {1}
    experiments.restore_rope(1)
    experiments.undo()
    assert set(experiments[0].lens.nulled_layers) == {1}
    experiments.undo()
    assert not experiments[0].lens.nulled_layers


class InterruptAfter(Observer):
    """Interrupts as soon as so many cells are done."""

    def __init__(self, n_cells: int) -> None:
        self.n_left = n_cells

    def advance(self, n: int) -> None:
        self.n_left -= n
        if self.n_left <= 0:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_keeps_the_complete_pairs(experiments: Experiments) -> None:
    n_cells = experiments[0].sweep("head").values.size
    result = experiments.sweep("head", observer=InterruptAfter(n_cells + 1))
    assert (result.interrupted, result.n_pairs, result.n_done) == (True, 1, n_cells)
    assert result.low.count() == 0
    partial = experiments.sweep("head", observer=InterruptAfter(1))
    assert 0 < partial.n_done < n_cells


def test_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="pair 1: clean has"):
        experiments_of(("to be", "to be or"), ("to do", "to be"))
    with pytest.raises(InputError, match="received 2 clean and 1 corrupt"):
        experiments_of(("to be", "to go"), ("to do",))
    with pytest.raises(InputError, match="received 1 metrics for 3 pairs"):
        experiments_of(metric=[loss])
    with pytest.raises(InputError, match="pair 0: clean is a str, not a prompt"):
        Experiments(["to be"], ["to do"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="clean as a list of prompts, received 3"):
        Experiments(3, [])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_condition_is_selected_once_and_applied_to_every_pair(experiments: Experiments) -> None:
    experiments.condition("bos-mlp", layer=1)
    for number in range(3):
        single = Experiment(
            experiments[number].clean, experiments[number].corrupt, experiments[number].metric
        )
        single.condition("bos-mlp", layer=1)
        assert experiments[number].values()[0] == single.values()[0]
