"""Another scale and another rope type equal those of a model that was configured so; what cannot be set is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import phaselens
from phaselens.errors import InputError, RefusedModel
from phaselens.lens.overrides import override_rope_scaling, override_softmax_scale
from phaselens.lens.scaling import RopeScaling
from phaselens.testing import tiny_model
from tests.lens.conftest import text
from tests.marks import mark_later_slow

LONG = 40


def logits(lens: phaselens.HookedTransformer) -> Tensor:
    return lens.stream(text(2, LONG), unembed=True)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_a_rope_type_equals_that_of_a_configured_model(rope_type: str) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "yarn":
        parameters["original_max_position_embeddings"] = 32
    configured = tiny_model("llama", max_position_embeddings=32, rope_parameters=parameters)
    lens = phaselens.load(tiny_model("llama", max_position_embeddings=32), rope_scaling=f"{rope_type}:4")
    assert torch.equal(logits(lens), logits(phaselens.load(configured)))
    plain = phaselens.load(tiny_model("llama", max_position_embeddings=32))
    assert not torch.equal(logits(lens), logits(plain))
    assert (lens.info.rope_scaling, plain.info.rope_scaling) == (f"{rope_type}:4", None)
    assert (lens.info.n_ctx, lens.info.n_ctx_trained) == (32, 32)
    assert lens.info.as_dict()["rope_scaling"] == f"{rope_type}:4"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mark_later_slow(["gpt-neox", "llama-gqa", "phi3", "cohere2", "gpt-oss"], 2)
)
def test_a_rope_type_is_served_in_other_families(family: str) -> None:
    """Loading compares the hooked forward with that of the model whose rotary module was exchanged."""
    if family == "gpt-oss":  # which has a rope type of its own
        with pytest.raises(RefusedModel, match="its rope type is 'yarn' already"):
            phaselens.load(tiny_model(family), rope_scaling="linear:2")
        return
    lens = phaselens.load(tiny_model(family), rope_scaling="linear:2")
    base = phaselens.load(tiny_model(family))
    assert lens.info.rotations[0].angles == pytest.approx(
        [angle / 2 for angle in base.info.rotations[0].angles]
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gemma2", "gpt-oss", "gpt2"], 2))
def test_a_scale_replaces_the_models_own(family: str) -> None:
    lens = phaselens.load(tiny_model(family), softmax_scale=0.21)
    assert lens.info.softmax_scale == 0.21
    assert set(lens.info.scales) == {0.21}
    assert not torch.equal(logits(lens), logits(phaselens.load(tiny_model(family))))


@pytest.mark.slow
def test_a_scale_equals_that_of_a_drope_checkpoint() -> None:
    configured = phaselens.load(tiny_model("llama-drope-nope", softmax_scale=0.21))
    lens = phaselens.load(tiny_model("llama-drope-nope"), softmax_scale=0.21)
    assert torch.equal(logits(lens), logits(configured))
    assert lens.info.softmax_scale == configured.info.softmax_scale == 0.21


def test_what_cannot_be_set_is_refused_by_name() -> None:
    for family, reason in (
        ("gpt2", "no rotary module"),
        ("llama-drope-nope", "no rotary module"),
        ("gemma3", "do not share one set of rope parameters"),
    ):
        with pytest.raises(RefusedModel, match=rf"rope_scaling=yarn:4 cannot be served: .*{reason}"):
            phaselens.load(tiny_model(family), rope_scaling="yarn:4")
    for wrong in ("yarn", "yarn:", "ntk:4", "yarn:0.5", "yarn:inf", 4, "linear:x"):
        with pytest.raises(InputError, match="rope_scaling is"):
            phaselens.load(tiny_model("llama"), rope_scaling=wrong)  # type: ignore[arg-type]
    for scale in (0, -1.0, float("nan"), "0.1", True):
        with pytest.raises(InputError, match="softmax_scale is"):
            phaselens.load(tiny_model("llama"), softmax_scale=scale)  # type: ignore[arg-type]
    assert str(RopeScaling.parse("yarn:4.0")) == "yarn:4"


def test_an_attention_without_an_attribute_for_its_scale_and_a_model_without_a_length_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_scale = tiny_model("llama")
    for layer in without_scale.model.layers:
        del layer.self_attn.scaling
    with pytest.raises(RefusedModel, match="softmax_scale cannot be set"):
        override_softmax_scale(without_scale, 0.21)
    monkeypatch.setattr("phaselens.lens.families.n_ctx_of", lambda model: None)
    with pytest.raises(RefusedModel, match="does not state the length that it was trained for"):
        override_rope_scaling(tiny_model("llama"), RopeScaling.parse("yarn:4"))


def test_a_rotary_module_that_cannot_be_made_leaves_the_configuration_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    parameters = dict(model.config.rope_parameters)

    def fail(*_: object) -> None:
        raise KeyError("rope_type")

    monkeypatch.setattr("phaselens.lens.overrides._replace", fail)
    with pytest.raises(RefusedModel, match="rope_scaling=linear:2 cannot be served: KeyError: 'rope_type'"):
        override_rope_scaling(model, RopeScaling.parse("linear:2"))
    assert model.config.rope_parameters == parameters
