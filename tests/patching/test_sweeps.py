"""Sweeps and attribution against TransformerLens and finite differences, in float64; interruption and errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformer_lens import patching as tl_patching

import phaselens
from phaselens.errors import InputError
from phaselens.patching import KINDS, Experiment, LogitMetric, agreement, logit_diff, prompt, stack
from phaselens.runs import Observer
from tests.marks import mark_later_slow
from tests.patching.conftest import experiment_of, lens_of

#: what, by, TransformerLens' function, and the order of our axes in its result.
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
    monkeypatch.setattr(tl_patching, "tqdm", lambda cells: cells)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected(experiment: Experiment, name: str) -> np.ndarray:
    _, cache = experiment.lens.run_with_cache(experiment.clean.tokens)
    tokens = experiment.corrupt.tokens
    function = getattr(tl_patching, f"get_act_patch_{name}")
    effects = function(experiment.lens, tokens, cache, lambda logits: experiment.metric(logits, tokens)[0])
    return effects.detach().numpy()


@pytest.mark.parametrize(("what", "by", "name", "order"), mark_later_slow(SWEEPS, 5))
def test_a_sweep_equals_transformer_lens(what, by, name, order):
    experiment = experiment_of("llama-gqa")
    swept = experiment.sweep(what, by=by)
    assert swept.n_done == swept.values.size
    assert np.abs(swept.effect).max() > 1e-3
    np.testing.assert_allclose(
        swept.values.data.transpose(order), expected(experiment, name), rtol=0, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", "gemma2", "phi3", "gpt-neox", "cohere2", "gpt-oss", "llama-drope-qk-norm-nope"]
)
@pytest.mark.parametrize(("what", "by", "name", "order"), SWEEPS[:4] + SWEEPS[5:12:2])
def test_a_sweep_equals_transformer_lens_in_other_families(family, what, by, name, order):
    experiment = experiment_of(family)
    swept = experiment.sweep(what, by=by)
    np.testing.assert_allclose(
        swept.values.data.transpose(order), expected(experiment, name), rtol=0, atol=1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "by", "name", "order"), [*SWEEPS[:3], *(SWEEPS[index] for index in (4, 6, 8, 10))]
)
def test_in_float32_a_sweep_is_as_close_to_float64_as_transformer_lens(what, by, name, order):
    """The two sweeps patch the same clean activations, since a cache of all points would change the rounding."""

    def sweeps(dtype: str) -> tuple[np.ndarray, np.ndarray]:
        torch.set_default_dtype(getattr(torch, dtype))
        lens = phaselens.load("rope", dtype=dtype, device="cpu")
        clean = prompt(lens, " the man went into the house")
        corrupt = prompt(lens, " the man went into the room")
        experiment = Experiment(clean, corrupt, logit_diff(lens, " and", "."))
        values = experiment.sweep(what, by=by).values.data
        _, cache = lens.run_with_cache(clean.tokens, names_filter=lambda point: point.endswith(KINDS[what]))
        function = getattr(tl_patching, f"get_act_patch_{name}")
        grid = function(
            lens, corrupt.tokens, cache, lambda logits: experiment.metric(logits, corrupt.tokens)[0]
        )
        return values, grid.detach().numpy()

    double, reference = sweeps("float64")
    np.testing.assert_allclose(double, reference, rtol=0, atol=1e-6)  # transformers norms in float32
    single, single_reference = sweeps("float32")
    noise = np.abs(single_reference - reference).max()
    assert np.ptp(reference) > 1e-3
    assert np.abs(single - reference).max() <= 2 * noise


def test_with_edits_each_cell_equals_a_full_run_with_one_more_patch(experiment):
    """Edits at, below and above the swept layer act once, in order."""
    experiment.patch("blocks.0.hook_mlp_out", pos=3)
    experiment.ablate("blocks.1.hook_resid_pre", pos=2, value="mean")
    experiment.ablate(what="head", layer=2, head=1, value=0.3)
    experiment.null_rope(1)
    resid = experiment.sweep("resid")
    attn = experiment.sweep("attn", layer=[1, 2])
    assert resid.base == experiment.values()[0]
    for layer, pos in ((0, 0), (1, 2), (1, 4), (2, 5)):
        experiment.patch(what="resid", layer=layer, pos=pos)
        assert resid.values[layer, pos] == pytest.approx(experiment.values()[0], abs=1e-12)
        experiment.undo()
    assert attn.layers == (1, 2)
    experiment.patch(what="attn", layer=2, pos=4)
    assert attn.values[1, 4] == pytest.approx(experiment.values()[0], abs=1e-12)


def test_patching_everything_restores_the_clean_run():
    swept = experiment_of().sweep("resid", layer=0)
    assert swept.values.shape == (1, 9)
    experiment = experiment_of()
    experiment.patch(what="resid", layer=0)
    edited, clean = experiment.values()
    assert edited == pytest.approx(clean, abs=1e-12)
    assert swept.recovered.shape == (1, 9)


def test_a_missing_key_head_is_masked():
    experiment = experiment_of("llama-gqa")
    keys, queries = experiment.sweep("k"), experiment.sweep("q")
    assert keys.values.shape == (3, 2)
    assert queries.values.shape == (3, 4)
    grid = keys.grid()
    assert grid.shape == (3, 4)
    assert grid.mask[:, 2:].all()
    assert not grid.mask[:, :2].any()
    stacked = stack([queries, keys])
    assert stacked.shape == (2, 3, 4)
    assert stacked.mask[1, :, 2:].all()
    assert stacked.count() == 18


class _Counting(Observer):
    """Counts the progress that a sweep reports."""

    def __init__(self) -> None:
        self.announced, self.done, self.steps = 0, 0, 0

    def measuring(self, label: str, n_tokens: int) -> None:
        self.announced += n_tokens

    def advance(self, n_tokens: int) -> None:
        self.done += n_tokens
        self.steps += 1


def test_progress_counts_cells():
    observer = _Counting()
    swept = experiment_of().sweep("head", by="pos-head", observer=observer)
    assert observer.announced == observer.done == swept.values.size == 108
    assert observer.steps == 6  # two forwards per layer


class _Impatient(Observer):
    """Presses Ctrl-C after a number of cells."""

    def __init__(self, cells: int) -> None:
        self.n_left = cells

    def advance(self, n_tokens: int) -> None:
        self.n_left -= n_tokens
        if self.n_left <= 0:
            raise KeyboardInterrupt


def test_after_ctrl_c_measured_cells_are_kept_and_the_others_masked():
    experiment = experiment_of()
    complete = experiment.sweep("resid")
    interrupted = experiment.sweep("resid", observer=_Impatient(10))
    assert interrupted.interrupted
    assert not complete.interrupted
    assert 0 < interrupted.n_done < complete.n_done
    done = ~interrupted.values.mask
    assert done[:2].all()
    assert not done[2:].any()
    np.testing.assert_array_equal(interrupted.values.data[done], complete.values.data[done])
    missing = [cell for cell in interrupted.cells() if cell["value"] is None]
    assert len(missing) == 9
    assert "stopped after 18 of 27 cells" in str(interrupted)
    assert experiment.sweep("resid").values.tolist() == complete.values.tolist()


def test_attribution_is_exact_where_the_metric_is_linear():
    """The metric is a sum of the last layer's z, without any nonlinearity on the way."""
    experiment = experiment_of()
    lens = experiment.lens
    activations = {}
    hooks = [("blocks.2.attn.hook_z", lambda z, hook: activations.__setitem__("z", z))]

    def linear(logits: torch.Tensor) -> torch.Tensor:
        return activations["z"].flatten(1).sum(1)

    experiment.metric = LogitMetric("sum of z", lambda logits, tokens: linear(logits))
    with lens.hooks(fwd_hooks=hooks):
        swept = experiment.sweep("v", by="pos-head", layer=2)
        estimate = experiment.attribution("v", by="pos-head", layer=2)
    np.testing.assert_allclose(estimate.values.data, swept.values.data, atol=1e-12)
    correlation = agreement(swept, estimate)
    assert correlation.n == 36
    assert correlation.pearson == pytest.approx(1.0)
    assert "36 cells: Pearson 1.000" in str(correlation)


# transformers computes RMS norms in float32 whatever the model's dtype: differences in those families are rough.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "step", "rel"),
    mark_later_slow([("gpt2", 1e-4, 1e-6), ("gpt-neox", 1e-4, 1e-6), ("llama-gqa", 3e-3, 1e-3)]),
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
    """The reference is a central difference between the corrupt and the clean activation, cell by cell."""
    experiment = experiment_of(family)
    estimate = experiment.attribution(what, by=by)
    swept = experiment.sweep(what, by=by)
    assert estimate.values.shape == swept.values.shape
    cells = [max(estimate.cells(), key=lambda cell: abs(cell["effect"])), next(iter(estimate.cells()))]
    for cell in cells:
        slope = _slope(experiment, what, cell, step)
        assert cell["effect"] == pytest.approx(slope, rel=rel, abs=rel / 100)


def _slope(experiment: Experiment, what: str, cell: dict, step: float) -> float:
    from phaselens.patching.passes import capture_activations
    from phaselens.patching.targets import resolve_target

    target = resolve_target(experiment.lens, 9, None, what, cell["layer"], cell.get("pos"), cell.get("head"))
    name = target.names[0]
    clean = capture_activations(experiment.lens, experiment.clean.tokens, [name])[name]
    values = []
    for distance in (step, -step):
        move = lambda old, hook, away=distance: target.write(name, old, old + away * (clean - old))  # noqa: E731
        logits = experiment.lens.stream(experiment.corrupt.tokens, [(name, move)], unembed=True)
        values.append(float(experiment.metric(logits, experiment.corrupt.tokens)[0]))
    return (values[0] - values[1]) / (2 * step)


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


def test_agreement_of_a_constant_is_undefined():
    experiment = experiment_of()
    swept = experiment.sweep("head", layer=0, observer=_Impatient(1))
    resid = experiment.sweep("resid", layer=0)
    with pytest.raises(InputError, match="differ in what, by"):
        agreement(swept, resid)
    unpatchable = Experiment(experiment.clean, experiment.clean, experiment.metric)
    flat = agreement(unpatchable.sweep("head"), unpatchable.attribution("head"))
    assert flat.pearson is None
    assert "undefined, one of the two is constant" in str(flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("residual",), r"what='residual'; did you mean resid\?"),
        (("resid", "head"), "resid has no heads"),
        (("q", "positions"), "by='positions'"),
    ],
)
def test_the_error_for_activations_that_cannot_be_swept(arguments, message):
    what, *by = arguments
    with pytest.raises(InputError, match=message):
        experiment_of().sweep(what, by=by[0] if by else None)
    with pytest.raises(InputError, match=message):
        experiment_of().attribution(what, by=by[0] if by else None)


def test_without_a_corrupt_run_nothing_can_be_swept():
    experiment = Experiment(prompt(lens_of("llama"), "to be"))
    for verb in (experiment.sweep, experiment.attribution, experiment.patch):
        with pytest.raises(InputError, match="there is no corrupt prompt"):
            verb(what="resid")


def test_a_custom_metric_returns_one_number_per_row():
    experiment = experiment_of()
    experiment.metric = LogitMetric("scalar", lambda logits, tokens: logits.sum())
    with pytest.raises(InputError, match=r"metric scalar: expected one number per row, \[1\], received \[\]"):
        experiment.sweep("resid")


def test_a_sweep_of_equal_prompts_has_no_recovered_fraction():
    experiment = experiment_of()
    unpatchable = Experiment(experiment.clean, experiment.clean, experiment.metric)
    with pytest.raises(InputError, match="nothing can be recovered"):
        unpatchable.sweep("resid").recovered  # noqa: B018
