"""Logit lens and direct logit attribution against the model's own norm and unembedding, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phaselens.errors import InputError
from phaselens.patching import Experiment, Prompt, direct_logit_attribution, logit_lens, prompt
from phaselens.testing import FAMILIES, tiny_lens
from tests.marks import mark_later_slow
from tests.patching.conftest import lens_of

IDS = (1, 5, 7, 9, 11)


def residuals(lens, ids=IDS):
    _, cache = lens.run_with_cache(torch.tensor([ids]))
    n_layers = lens.info.n_layers
    names = [
        *(f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)),
        f"blocks.{n_layers - 1}.hook_resid_post",
    ]
    return torch.stack([cache[name][0] for name in names]), cache


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_depth_is_the_models_own_norm_and_unembedding_of_its_residual(family):
    lens = lens_of(family)
    result = logit_lens(Prompt(lens, "", IDS), pos=3, top=2)
    model = lens.original_model
    norm = model.model.norm if family == "llama" else model.transformer.ln_f
    streams, _ = residuals(lens)
    with torch.no_grad():
        expected = model.lm_head(norm(streams))[:, 3].double().softmax(-1)
    probabilities = np.array([[p for _, p in tokens] for tokens in result.top])
    assert np.allclose(probabilities, expected.topk(2).values, rtol=1e-6)
    own = lens.stream(torch.tensor([IDS]), unembed=True)[0, 3].softmax(-1)
    assert result.top[-1][0][1] == float(own.max())
    assert (result.metric, result.values) == (None, None)
    assert result.to_table().column("depth") == [0, 1, 2, 3]


def test_the_lens_reads_the_edited_run_and_its_metric(experiment: Experiment) -> None:
    experiment.ablate("blocks.1.hook_mlp_out")
    result = logit_lens(experiment)
    assert result.values is not None
    assert result.values[-1] == pytest.approx(experiment.values()[0])
    assert result.values[1] == pytest.approx(
        logit_lens(Experiment(experiment.corrupt, None, experiment.metric)).values[1]
    )
    assert "the last column is logit_diff('e', 'o')" in str(result)
    assert logit_lens(Experiment(Prompt(experiment.lens, "", (1,)))).values is None


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(sorted(FAMILIES), 3))
def test_the_parts_add_up_to_the_logits(family):
    lens = tiny_lens(family, dtype=torch.float64)
    result = direct_logit_attribution(Prompt(lens, "", IDS), 3, 4)
    logits = lens.stream(torch.tensor([IDS]), unembed=True)[0, -1]
    parts = result.embed + result.constant + result.attn.sum() + result.mlp.sum()
    assert parts == pytest.approx(result.total, abs=1e-6)
    if not any("soft cap" in note for note in result.notes):
        assert result.total == pytest.approx(float(logits[3] - logits[4]), abs=1e-12)
    if result.heads.count():
        split = result.heads.sum(1) + result.attn_bias
        assert np.allclose(split, result.attn, atol=1e-9)
    else:
        assert "heads are not split" in result.notes[0]


@torch.no_grad()
def test_each_part_is_its_output_through_the_frozen_norm() -> None:
    lens = lens_of("llama")
    streams, cache = residuals(lens)
    model = lens.original_model
    final = streams[-1][-1].double()
    divisor = (final.square().mean() + model.model.norm.variance_epsilon).sqrt()
    output = (
        (model.lm_head.weight[3] - model.lm_head.weight[4]).double()
        * model.model.norm.weight.double()
        / divisor
    )
    result = direct_logit_attribution(Prompt(lens, "", IDS), 3, 4)
    for layer in range(3):
        mlp = cache[f"blocks.{layer}.hook_mlp_out"][0, -1].double()
        z, weight = cache[f"blocks.{layer}.attn.hook_z"][0, -1].double(), lens.blocks[layer].attn.W_O.double()
        assert result.mlp[layer] == pytest.approx(float(output @ mlp), abs=1e-6)
        heads = torch.einsum("hd,hdm,m->h", z, weight, output).tolist()
        assert result.heads[layer].tolist() == pytest.approx(heads, abs=1e-6)
    assert result.embed == pytest.approx(float(output @ streams[0][-1].double()), abs=1e-6)


def test_an_edit_of_the_stream_counts_in_the_layer_below_it(experiment: Experiment) -> None:
    before = direct_logit_attribution(experiment, "e", "o")
    experiment.patch("blocks.2.hook_resid_pre", pos=-1)
    after = direct_logit_attribution(experiment, "e", "o")
    assert after.total == pytest.approx(experiment.values()[0])
    assert after.mlp[1] != before.mlp[1]


def test_wrong_calls_are_refused_in_one_line(experiment: Experiment) -> None:
    with pytest.raises(InputError, match="give two different tokens"):
        direct_logit_attribution(experiment, "e", "e")
    with pytest.raises(InputError, match="expected source as a prompt or an Experiment, received 3"):
        logit_lens(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top=0"):
        logit_lens(experiment, top=0)
    with pytest.raises(InputError, match="pos 99"):
        logit_lens(experiment, pos=99)
    alone = direct_logit_attribution(prompt(experiment.lens, "to be"), "e")
    assert alone.quantity == "logit of 'e'"
    assert alone.strongest(2)[0][1] != 0.0
