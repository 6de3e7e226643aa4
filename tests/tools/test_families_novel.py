"""A model type that a newer transformers adds is tried like the others, and served without code of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tools.families.models import tiny_model
from tools.families.trial import try_model_type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import phaselens
from phaselens.lens import run_checks
from tests.tools.novel import NovelConfig, NovelForCausalLM


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    AutoConfig.register("novel_lm", NovelConfig)
    AutoModelForCausalLM.register(NovelConfig, NovelForCausalLM)
    yield
    del CONFIG_MAPPING._extra_content["novel_lm"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[NovelConfig]


@pytest.mark.slow
def test_a_new_type_is_tried_and_served() -> None:
    trial = try_model_type("novel_lm", dtypes=("float32", "float64"))
    assert trial.class_name == "NovelForCausalLM"
    assert (trial.refusals, trial.problems, trial.unbuildable) == ({}, {}, "")
    assert trial.is_served
    assert trial.measurements["float64"].worst < 1e-12
    assert set(trial.positions) == {"rope"}
    assert trial.absent == {}


@pytest.mark.slow
def test_a_new_type_passes_every_check_and_loses_its_rotation() -> None:
    lens = phaselens.load(tiny_model("novel_lm"))
    assert [result.name for result in run_checks(lens) if not result.ok] == []
    assert [lens.info.n_heads, lens.info.n_kv_heads, lens.info.scales[0]] == [4, 2, 0.5]
    nulled = phaselens.load(tiny_model("novel_lm"), positions="nope")
    assert set(nulled.info.positions) == {"nope"}
