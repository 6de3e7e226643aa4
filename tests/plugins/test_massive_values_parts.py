"""Rotated and unrotated dimensions of one head, reported apart."""

from __future__ import annotations

import pytest
import torch

import phaselens
from phaselens.lens.checks import capture
from phaselens.testing import tiny_lens, tiny_tokenizer
from tests.lens.measured import model_of

TEXT = "to be or not to be that is the question"


def parts_in(lens):
    run = phaselens.run([lens], metrics=[("massive-values", {"multiple": 1.5})], texts=[TEXT])
    table = run.table("massive-values", "parts").to_pydict()
    keys = zip(table["layer"], table["head"], table["tensor"], table["part"], strict=True)
    return {key: {name: table[name][row] for name in table} for row, key in enumerate(keys)}


def latent_lens():
    return phaselens.load(model_of("minicpm3"), label="latent", tokenizer=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["q", "k"])
def test_the_parts_of_latent_queries_and_keys_equal_the_dense_computation(tensor):
    """The last 4 of 12 dimensions are the ones that the model's configuration says it rotates."""
    lens = latent_lens()
    rows = parts_in(lens)
    tokens = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    _, activations = capture(lens, tokens, {0: f"blocks.1.attn.hook_rot_{tensor}"})
    norms = activations[0][0].double().norm(dim=0)  # [head, d_head]
    is_massive = norms > 1.5 * norms.mean()
    for head in range(len(norms)):
        for part, dimensions in (("rotated", slice(8, 12)), ("unrotated", slice(0, 8))):
            row = rows[1, head, tensor, part]
            share = norms[head, dimensions].square().sum() / norms[head].square().sum()
            assert row["count"] == float(is_massive[head, dimensions].sum())
            assert row["norm_share"] == pytest.approx(float(share), abs=1e-6)
            assert row["n_cells"] == (4 if part == "rotated" else 8)
            assert row["null_share"] == pytest.approx((4 if part == "rotated" else 8) / 12)


def test_a_rotation_of_all_dimensions_or_of_none_has_no_parts():
    assert parts_in(tiny_lens("llama")) == {}
    assert parts_in(tiny_lens("gpt2")) == {}


def test_partial_rotary_models_have_parts():
    rows = parts_in(tiny_lens("gpt-neox"))
    assert {key[3] for key in rows} == {"rotated", "unrotated"}
    assert all(row["n_cells"] == 4 for row in rows.values())


def test_a_missing_point_leaves_the_other_tensors_measured():
    run = phaselens.run([latent_lens()], metrics=["massive-values"], texts=[TEXT])
    table = run.table("massive-values", "texts").to_pydict()
    counts = dict(zip(table["tensor"], table["count_global"], strict=True))
    assert counts["k_pre"] is None
    assert None not in [counts[name] for name in ("q", "k", "v", "q_pre")]
    assert any("kv_a_proj_with_mqa and kv_b_proj" in warning for warning in run.warnings)
