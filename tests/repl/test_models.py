"""`SessionModel` wraps one lens: calls, attributes and checks of its class go to the lens."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

import phaselens
from phaselens.errors import InputError
from phaselens.patching import Experiment, Prompt, logit_diff, prompt
from phaselens.repl.models import SessionModel
from phaselens.testing import tiny_lens


@pytest.fixture(scope="module")
def lens():
    return tiny_lens("llama", label="rope")


@pytest.fixture(scope="module")
def m(lens):
    return SessionModel(lens)


def test_calls_and_attributes_are_those_of_the_lens(lens, m):
    tokens = lens.to_tokens("to be")
    assert torch.equal(m(tokens), lens(tokens))
    assert m.info is lens.info
    assert m.blocks[0] is lens.blocks[0]
    assert {*dir(lens), "prompt"} == {*dir(m)}
    with pytest.raises(AttributeError):
        _ = m.no_such_attribute
    with m.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value * 0)]):
        edited = m(tokens)
        assert torch.equal(edited, lens(tokens))
    assert not torch.equal(edited, m(tokens))


def test_attributes_are_set_on_the_lens(lens, m):
    m.remark = "seen"
    assert lens.remark == "seen"
    del m.remark
    assert not hasattr(lens, "remark")


def test_a_session_model_passes_checks_of_the_lens_class(lens, m):
    assert isinstance(m, phaselens.HookedTransformer | TransformerBridge)
    assert isinstance(m, SessionModel)
    assert not isinstance(lens, SessionModel)
    assert type(lens) is phaselens.HookedTransformer
    with pytest.raises(InputError, match="rope is loaded already"):
        phaselens.load(m)


def test_two_wrappers_of_one_lens_are_independent(lens, m):
    second = SessionModel(lens)
    assert inspect.unwrap(second) is inspect.unwrap(m) is lens
    assert copy.copy(m).info is lens.info


def test_patching_accepts_a_session_model(lens, m):
    clean, corrupt = m.prompt("to be"), prompt(m, "to do")
    assert clean.lens is corrupt.lens is Prompt(m, "", (0,)).lens is lens
    experiment = Experiment(clean, corrupt, logit_diff(m, "e", "o"))
    expected = Experiment(prompt(lens, "to be"), prompt(lens, "to do"), logit_diff(lens, "e", "o")).sweep(
        "head"
    )
    assert (experiment.sweep("head").values == expected.values).all()


def test_transformer_lens_patching_accepts_a_session_model(lens, m):
    clean, corrupt = lens.to_tokens("to be"), lens.to_tokens("to do")
    _, cache = m.run_with_cache(clean)

    def metric(logits):
        return logits[0, -1, 3]

    effects = patching.get_act_patch_resid_pre(m, corrupt, cache, metric)
    assert torch.equal(effects, patching.get_act_patch_resid_pre(lens, corrupt, cache, metric))


def test_a_run_accepts_a_session_model(lens, m):
    wrapped, unwrapped = (
        phaselens.run(model, metrics=["sinks"], texts=["to be or not"]) for model in (m, lens)
    )
    assert wrapped.table("sinks", "heads").equals(unwrapped.table("sinks", "heads"))
