"""Sweeps against TransformerLens' own functions, in float64, and what they do when they cannot go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformer_lens import patching as theirs

import phaselens
from phaselens.errors import InputError
from phaselens.patching import KINDS, Experiment, LogitMetric, agreement, logit_diff, prompt, stack
from phaselens.runs import Observer
from tests.marks import first_quick
from tests.patching.conftest import experiment_of, lens_of

#: what, by, TransformerLens' function, and our axes in the order of its own.
SWEEPS = [
    ("resid", "pos", "resid_pre", (0, 1)),
    ("attn", "pos", "attn_out", (0, 1)),
    ("mlp", "pos", "mlp_out", (0, 1)),
    ("head", "head", "attn_head_out_all_pos", (0, 1)),
    ("head", "pos-head", "attn_head_out_by_pos", (0, 1, 2)),
    ("q", "head", "attn_head_q_all_pos", (0, 1)),
    ("q", "pos-head", "attn_head_q_by_pos", (0, 1, 2)),
    ("k", "head", "attn_head_k_all_pos", (0, 1)),
    ("k", "pos-head", "attn_head_k_by_pos", (0, 1, 2)),
    ("v", "head", "attn_head_v_all_pos", (0, 1)),
    ("v", "pos-head", "attn_head_v_by_pos", (0, 1, 2)),
    ("pattern", "head", "attn_head_pattern_all_pos", (0, 1)),
    ("pattern", "pos-head", "attn_head_pattern_by_pos", (0, 2, 1)),
]


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TransformerLens keeps results in torch's default dtype and draws progress bars."""
    monkeypatch.setattr(theirs, "tqdm", lambda cells: cells)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected(experiment: Experiment, name: str) -> np.ndarray:
    _, cache = experiment.lens.run_with_cache(experiment.clean.tokens)
    tokens = experiment.corrupt.tokens
    function = getattr(theirs, f"get_act_patch_{name}")
    found = function(experiment.lens, tokens, cache, lambda logits: experiment.metric(logits, tokens)[0])
    return found.detach().numpy()


@pytest.mark.parametrize(("what", "by", "name", "order"), first_quick(SWEEPS, 5))
def test_a_sweep_is_what_transformer_lens_finds(what, by, name, order):
    experiment = experiment_of("llama-gqa")
    found = experiment.sweep(what, by=by)
    assert found.n_done == found.values.size
    assert np.abs(found.effect).max() > 1e-3
    np.testing.assert_allclose(
        found.values.data.transpose(order), expected(experiment, name), rtol=0, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", "gemma2", "phi3", "gpt-neox", "cohere2", "gpt-oss", "llama-drope-qk-norm-nope"]
)
@pytest.mark.parametrize(("what", "by", "name", "order"), SWEEPS[:4] + SWEEPS[5:12:2])
def test_a_sweep_is_what_transformer_lens_finds_in_other_families(family, what, by, name, order):
    experiment = experiment_of(family)
    found = experiment.sweep(what, by=by)
    np.testing.assert_allclose(
        found.values.data.transpose(order), expected(experiment, name), rtol=0, atol=1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "by", "name", "order"), [*SWEEPS[:3], *(SWEEPS[place] for place in (4, 6, 8, 10))]
)
def test_in_float32_a_sweep_is_as_near_to_float64_as_transformer_lens_is(what, by, name, order):
    """From the same clean activations: a cache of everything would build attention matrices, and round otherwise."""

    def sweeps(dtype: str) -> tuple[np.ndarray, np.ndarray]:
        torch.set_default_dtype(getattr(torch, dtype))
        lens = phaselens.load("rope", dtype=dtype, device="cpu")
        clean = prompt(lens, " the man went into the house")
        corrupt = prompt(lens, " the man went into the room")
        experiment = Experiment(clean, corrupt, logit_diff(lens, " and", "."))
        values = experiment.sweep(what, by=by).values.data
        _, cache = lens.run_with_cache(clean.tokens, names_filter=lambda point: point.endswith(KINDS[what]))
        function = getattr(theirs, f"get_act_patch_{name}")
        grid = function(
            lens, corrupt.tokens, cache, lambda logits: experiment.metric(logits, corrupt.tokens)[0]
        )
        return values, grid.detach().numpy()

    ours, reference = sweeps("float64")
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)  # transformers norms in float32
    single, single_reference = sweeps("float32")
    noise = np.abs(single_reference - reference).max()
    assert np.ptp(reference) > 1e-3
    assert np.abs(single - reference).max() <= 2 * noise


def test_on_top_of_edits_each_cell_is_a_whole_run_with_one_more_patch(experiment):
    """Edits at, below and above the swept layer act once, in their order."""
    experiment.patch("blocks.0.hook_mlp_out", pos=3)
    experiment.ablate("blocks.1.hook_resid_pre", pos=2, value="mean")
    experiment.ablate(what="head", layer=2, head=1, value=0.3)
    experiment.nope(1)
    found = experiment.sweep("resid")
    attn = experiment.sweep("attn", layer=[1, 2])
    assert found.base == experiment.values()[0]
    for layer, pos in ((0, 0), (1, 2), (1, 4), (2, 5)):
        experiment.patch(what="resid", layer=layer, pos=pos)
        assert found.values[layer, pos] == pytest.approx(experiment.values()[0], abs=1e-12)
        experiment.undo()
    assert attn.layers == (1, 2)
    experiment.patch(what="attn", layer=2, pos=4)
    assert attn.values[1, 4] == pytest.approx(experiment.values()[0], abs=1e-12)


def test_patching_everything_restores_the_clean_run():
    found = experiment_of().sweep("resid", layer=0)
    assert found.values.shape == (1, 9)
    experiment = experiment_of()
    experiment.patch(what="resid", layer=0)
    edited, clean = experiment.values()
    assert edited == pytest.approx(clean, abs=1e-12)
    assert found.recovered.shape == (1, 9)


def test_a_key_head_that_is_not_there_is_empty():
    experiment = experiment_of("llama-gqa")
    keys, queries = experiment.sweep("k"), experiment.sweep("q")
    assert keys.values.shape == (3, 2)
    assert queries.values.shape == (3, 4)
    grid = keys.grid()
    assert grid.shape == (3, 4)
    assert grid.mask[:, 2:].all()
    assert not grid.mask[:, :2].any()
    both = stack([queries, keys])
    assert both.shape == (2, 3, 4)
    assert both.mask[1, :, 2:].all()
    assert both.count() == 18


class _Counting(Observer):
    """Adds up what a progress bar is told."""

    def __init__(self) -> None:
        self.announced, self.done, self.steps = 0, 0, 0

    def measuring(self, label: str, n_tokens: int) -> None:
        self.announced += n_tokens

    def advance(self, n_tokens: int) -> None:
        self.done += n_tokens
        self.steps += 1


def test_progress_is_told_cell_by_cell():
    seen = _Counting()
    found = experiment_of().sweep("head", by="pos-head", observer=seen)
    assert seen.announced == seen.done == found.values.size == 108
    assert seen.steps == 6  # two forwards a layer


class _Impatient(Observer):
    """Presses Ctrl-C after so many cells."""

    def __init__(self, cells: int) -> None:
        self.left = cells

    def advance(self, n_tokens: int) -> None:
        self.left -= n_tokens
        if self.left <= 0:
            raise KeyboardInterrupt


def test_what_was_done_before_ctrl_c_is_kept_and_the_rest_masked():
    experiment = experiment_of()
    whole = experiment.sweep("resid")
    part = experiment.sweep("resid", observer=_Impatient(10))
    assert part.interrupted
    assert not whole.interrupted
    assert 0 < part.n_done < whole.n_done
    done = ~part.values.mask
    assert done[:2].all()
    assert not done[2:].any()
    np.testing.assert_array_equal(part.values.data[done], whole.values.data[done])
    missing = [cell for cell in part.cells() if cell["value"] is None]
    assert len(missing) == 9
    assert "stopped after 18 of 27 cells" in str(part)
    assert experiment.sweep("resid").values.tolist() == whole.values.tolist()


def test_attribution_is_exact_where_the_metric_is_linear():
    """A sum of the last layer's z, which the metric reads through nothing that bends it."""
    experiment = experiment_of()
    lens = experiment.lens
    kept = {}
    hooks = [("blocks.2.attn.hook_z", lambda z, hook: kept.__setitem__("z", z))]

    def linear(logits: torch.Tensor) -> torch.Tensor:
        return kept["z"].flatten(1).sum(1)

    experiment.metric = LogitMetric("sum of z", lambda logits, tokens: linear(logits))
    with lens.hooks(fwd_hooks=hooks):
        swept = experiment.sweep("v", by="pos-head", layer=2)
        estimate = experiment.attribution("v", by="pos-head", layer=2)
    np.testing.assert_allclose(estimate.values.data, swept.values.data, atol=1e-12)
    told = agreement(swept, estimate)
    assert told.n == 36
    assert told.pearson == pytest.approx(1.0)
    assert "36 cells: Pearson 1.000" in str(told)


# transformers computes RMS norms in float32 whatever the model's dtype: differences in those families are rough.
@pytest.mark.parametrize(
    ("family", "step", "rel"),
    first_quick([("gpt2", 1e-4, 1e-6), ("gpt-neox", 1e-4, 1e-6), ("llama-gqa", 3e-3, 1e-3)]),
)
@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("resid", "pos"),
        ("mlp", "pos"),
        ("q", "head"),
        ("k", "pos-head"),
        ("v", "pos"),
        ("head", "head"),
        ("pattern", "pos-head"),
        ("pattern", "pos"),
    ],
)
def test_attribution_is_the_derivative_of_moving_towards_the_clean_activation(family, step, rel, what, by):
    """Against a central difference along the way from the corrupt to the clean activation, cell by cell."""
    experiment = experiment_of(family)
    estimate = experiment.attribution(what, by=by)
    swept = experiment.sweep(what, by=by)
    assert estimate.values.shape == swept.values.shape
    cells = [max(estimate.cells(), key=lambda cell: abs(cell["effect"])), next(iter(estimate.cells()))]
    for cell in cells:
        slope = _slope(experiment, what, cell, step)
        assert cell["effect"] == pytest.approx(slope, rel=rel, abs=rel / 100)


def _slope(experiment: Experiment, what: str, cell: dict, step: float) -> float:
    from phaselens.patching.passes import captured
    from phaselens.patching.points import target

    place = target(experiment.lens, 9, None, what, cell["layer"], cell.get("pos"), cell.get("head"))
    name = place.names[0]
    clean = captured(experiment.lens, experiment.clean.tokens, [name])[name]
    found = []
    for away in (step, -step):
        move = lambda old, hook, away=away: place.write(name, old, old + away * (clean - old))  # noqa: E731
        logits = experiment.lens.stream(experiment.corrupt.tokens, [(name, move)], unembed=True)
        found.append(float(experiment.metric(logits, experiment.corrupt.tokens)[0]))
    return (found[0] - found[1]) / (2 * step)


def test_attribution_needs_no_gradient_of_the_weights():
    experiment = experiment_of()
    before = experiment.attribution("head").values
    for weight in lens_of("llama").original_model.parameters():
        weight.requires_grad_(False)
    after = experiment.attribution("head").values
    for weight in lens_of("llama").original_model.parameters():
        weight.requires_grad_(True)
        assert weight.grad is None
    np.testing.assert_array_equal(before, after)


def test_agreement_says_when_there_is_none():
    experiment = experiment_of()
    swept = experiment.sweep("head", layer=0, observer=_Impatient(1))
    part = experiment.sweep("resid", layer=0)
    with pytest.raises(InputError, match="differ in what, by"):
        agreement(swept, part)
    same = Experiment(experiment.clean, experiment.clean, experiment.metric)
    flat = agreement(same.sweep("head"), same.attribution("head"))
    assert flat.pearson is None
    assert "not to be said, one of the two is the same everywhere" in str(flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("residual",), r"what='residual'; did you mean resid\?"),
        (("resid", "head"), "resid has no heads"),
        (("q", "positions"), "by='positions'"),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(arguments, message):
    what, *by = arguments
    with pytest.raises(InputError, match=message):
        experiment_of().sweep(what, by=by[0] if by else None)
    with pytest.raises(InputError, match=message):
        experiment_of().attribution(what, by=by[0] if by else None)


def test_without_a_corrupt_run_nothing_can_be_swept():
    alone = Experiment(prompt(lens_of("llama"), "to be"))
    for verb in (alone.sweep, alone.attribution, alone.patch):
        with pytest.raises(InputError, match="there is no corrupt prompt"):
            verb(what="resid")


def test_a_metric_of_ones_own_gives_a_number_a_row():
    experiment = experiment_of()
    experiment.metric = LogitMetric("scalar", lambda logits, tokens: logits.sum())
    with pytest.raises(InputError, match=r"metric scalar: expected one number a row, \[1\], got \[\]"):
        experiment.sweep("resid")


def test_a_sweep_where_nothing_differs_recovers_nothing_and_says_so():
    experiment = experiment_of()
    same = Experiment(experiment.clean, experiment.clean, experiment.metric)
    with pytest.raises(InputError, match="nothing can be recovered"):
        same.sweep("resid").recovered  # noqa: B018
