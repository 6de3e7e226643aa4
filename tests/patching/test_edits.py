"""Edits, their stack, and what is said of what cannot be."""

from __future__ import annotations

import pytest
import torch

from phaselens.errors import InputError, RefusedModel
from phaselens.patching import Experiment, logit_diff, loss, prompt
from phaselens.patching.passes import rotation
from tests.patching.conftest import experiment_of, lens_of


def activation(
    experiment: Experiment, name: str, *, edited: bool = True, clean: bool = False
) -> torch.Tensor:
    """What stands at a point after all hooks, from a plain run with TransformerLens' own hooks."""
    kept = {}
    hooks = experiment.hooks() if edited else []
    tokens = (experiment.clean if clean else experiment.edited).tokens
    experiment.lens.stream(
        tokens, [*hooks, (name, lambda value, hook: kept.__setitem__(name, value.clone()))]
    )
    return kept[name]


@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_mid", "blocks.2.attn.hook_k", "blocks.0.mlp.hook_post"]
)
def test_a_patch_writes_the_clean_run_at_its_positions_and_nowhere_else(experiment, name):
    before = activation(experiment, name)
    clean = activation(experiment, name, edited=False, clean=True)
    experiment.patch(name, pos=[4, -1])
    after = activation(experiment, name)
    assert torch.equal(after[:, [4, 8]], clean[:, [4, 8]])
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, 8], before[:, 8])


def test_a_patch_of_heads_leaves_the_other_heads(experiment):
    name = "blocks.1.attn.hook_z"
    before, clean = activation(experiment, name), activation(experiment, name, edited=False, clean=True)
    experiment.patch(what="head", layer=1, head=2)
    after = activation(experiment, name)
    assert torch.equal(after[:, :, 2], clean[:, :, 2])
    assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])


def test_pattern_rows_are_those_of_queries(experiment):
    name = "blocks.1.attn.hook_pattern"
    before, clean = activation(experiment, name), activation(experiment, name, edited=False, clean=True)
    experiment.patch(what="pattern", layer=1, head=1, pos=6)
    after = activation(experiment, name)
    assert torch.equal(after[:, 1, 6], clean[:, 1, 6])
    assert torch.equal(after[:, 1, :6], before[:, 1, :6])
    assert torch.equal(after[:, 0], before[:, 0])


@pytest.mark.parametrize(("value", "expected"), [("zero", 0.0), (1.5, 1.5)])
def test_an_ablation_writes_its_number(experiment, value, expected):
    experiment.ablate(what="mlp", layer=[0, 2], pos=3, value=value)
    for layer in (0, 2):
        after = activation(experiment, f"blocks.{layer}.hook_mlp_out")
        assert (after[:, 3] == expected).all()
        assert not (after[:, 4] == expected).all()


def test_a_mean_ablation_is_over_positions_of_the_same_run(experiment):
    name = "blocks.1.hook_attn_out"
    before = activation(experiment, name)
    experiment.ablate(name, pos=2, value="mean")
    assert torch.equal(activation(experiment, name)[:, 2], before.mean(1))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            {"what": "pattern", "layer": 1},
            "blocks.1.attn.hook_pattern: value='mean': the mean of its rows over queries lets a query attend to "
            "later keys; write 'zero' or a number, or ablate hook_z or hook_v of the layer to their mean",
        ),
        (
            {"point": "blocks.0.attn.hook_attn_scores", "pos": 3, "head": 1},
            "blocks.0.attn.hook_attn_scores: value='mean': the mean of its rows over queries is -inf for every key "
            "that is hidden from one of them; write 'zero' or a number, or ablate hook_z or hook_v of the layer to "
            "their mean",
        ),
    ],
)
def test_attention_rows_have_no_mean_over_queries(experiment, place, message):
    """What the two messages say is so."""
    name = place.get("point", "blocks.1.attn.hook_pattern")
    mean = activation(experiment, name).mean(2)
    assert bool((mean[..., 1:] == -torch.inf).all() if "scores" in name else (mean > 0).all())
    with pytest.raises(InputError) as error:
        experiment.ablate(**place, value="mean")
    assert str(error.value) == message
    assert not experiment.patched()
    for instead in ({"value": 0.5}, {"value": "zero"}):
        experiment.ablate(**place, **instead)
    for point in ("hook_z", "hook_v"):
        experiment.ablate(f"blocks.1.attn.{point}", value="mean")


def test_undo_takes_back_one_edit_after_the_other(experiment):
    bare = experiment.values()[0]
    experiment.patch(what="resid", layer=1, pos=4)
    patched = experiment.values()[0]
    experiment.nope(2)
    experiment.ablate(what="head", layer=0)
    assert len({bare, patched, experiment.values()[0]}) == 3
    assert [str(edit).split()[0] for edit in experiment.patched()] == ["patch", "rotation", "ablate"]
    experiment.undo()
    experiment.undo()
    assert experiment.values()[0] == patched
    assert rotation(experiment.lens) == (False, False, False)
    experiment.undo()
    assert experiment.values()[0] == bare
    assert str(experiment.patched()) == "no edits"
    with pytest.raises(InputError, match="there is no edit to take back"):
        experiment.undo()


def test_rotation_is_switched_live_and_run_shows_the_model_as_loaded_before(experiment):
    lens = experiment.lens
    plain = lens.stream(experiment.corrupt.tokens)
    before = experiment.run()
    experiment.nope(range(2))
    assert not torch.allclose(lens.stream(experiment.corrupt.tokens), plain)
    told = experiment.run()
    assert told.value[0] == before.value[0]
    assert told.value[1] != told.value[0]
    assert rotation(lens) == (True, True, False)
    experiment.rope(1)
    assert str(experiment.patched()[-1]) == "rotation of layer 1 restored"
    assert rotation(lens) == (True, False, False)
    experiment.undo()
    assert rotation(lens) == (True, True, False)
    with pytest.raises(InputError, match="no rotation was nulled in layer 2"):
        experiment.rope(2)
    with pytest.raises(InputError, match="there is no rotation to null in layers 0, 1"):
        experiment.nope([0, 1])


def test_learned_positions_are_no_rotation():
    experiment = experiment_of("gpt2")
    with pytest.raises(RefusedModel, match="only rotary models can be nulled"):
        experiment.nope()
    assert rotation(experiment.lens) == (False, False, False)


def test_prompts_can_be_exchanged_under_the_edits(experiment):
    lens = experiment.lens
    new = prompt(lens, "a cat"), prompt(lens, "a dog")
    experiment.patch(what="resid", layer=0)
    experiment.prompts(*new)
    edited, clean = experiment.values()
    assert edited == pytest.approx(clean, abs=1e-12)


def test_an_edit_that_does_not_fit_is_set_aside_and_comes_back(experiment):
    lens = experiment.lens
    long = experiment.clean, experiment.corrupt
    short = prompt(lens, "a cat"), prompt(lens, "a dog")
    experiment.ablate(what="mlp", layer=1, pos=2)
    experiment.patch(what="resid", layer=0, pos=[1, 8])
    both = experiment.values()[0]
    experiment.prompts(*short)
    kept, aside = experiment.patched()
    assert (kept.set_aside, aside.set_aside) == (None, "the prompts have 6 tokens")
    assert str(experiment.patched()).splitlines()[1] == (
        "2. patch blocks.0.hook_resid_pre at positions 1, 8 from the clean run – set aside: the prompts have 6 tokens"
    )
    alone = Experiment(*short, experiment.metric)
    alone.ablate(what="mlp", layer=1, pos=2)
    outcome, swept = experiment.run(), experiment.sweep("head")
    assert outcome.value == alone.run().value
    assert outcome.edits == (str(kept),)
    assert outcome.set_aside == swept.set_aside == experiment.measure("sinks").set_aside
    assert "set aside: 2. patch blocks.0" in str(outcome)
    assert swept.base == alone.values()[0]
    experiment.prompts(*long)
    assert not experiment.patched().set_aside
    assert experiment.values()[0] == both


def test_an_edit_that_is_set_aside_can_be_undone(experiment):
    experiment.patch(what="resid", layer=0, pos=8)
    experiment.prompts(prompt(experiment.lens, "a"))
    assert experiment.patched().set_aside[0].endswith("(there is no corrupt prompt)")
    assert str(experiment.undo()).startswith("patch blocks.0.hook_resid_pre at position 8")
    assert not experiment.patched()


@pytest.mark.parametrize("text", ["a", "to be or not to be"])
def test_positions_from_the_end_are_those_of_the_present_prompt(experiment, text):
    """As the call that makes the edit again would place them."""
    other = prompt(experiment.lens, text)
    experiment.ablate(what="mlp", layer=1, pos=-1)
    experiment.ablate(what="attn", layer=0, pos=[-2])
    experiment.prompts(other)
    fresh = Experiment(other, None, experiment.metric)
    for edit in experiment.patched():
        eval(f"fresh.{edit.code}", {"fresh": fresh})
    assert str(experiment.patched()) == str(fresh.patched())
    assert experiment.run().value == fresh.run().value
    assert f"at position {len(other) - 1} " in str(experiment.patched()[0])


def test_places_may_come_as_any_whole_numbers_and_be_read_only_once(experiment):
    import numpy as np

    edit = experiment.patch(
        what="q", layer=np.int64(1), pos=(place for place in (3, 4)), head=np.array([0, 2])
    )
    assert edit.code == "patch(layer=1, pos=[3, 4], head=[0, 2], what='q')"
    assert edit.target.positions == (3, 4)
    assert experiment.ablate(what="mlp", value=np.float32(0.5)).code == "ablate(what='mlp', value=0.5)"


def test_a_metric_that_the_prompt_is_too_short_for_is_left_out_of_run(experiment):
    experiment.metric = logit_diff(experiment.lens, "e", "o", pos=20)
    outcome = experiment.run()
    assert outcome.value is None
    assert (
        outcome.reason
        == "logit_diff('e', 'o', pos=20) needs a prompt of 21 tokens or more, and this one has 9 tokens"
    )
    with pytest.raises(InputError, match="pos 20, but the prompt has 9 tokens"):
        experiment.sweep("head")


def test_a_metric_is_checked_when_it_is_set(experiment):
    with pytest.raises(InputError, match="a metric is logit_diff"):
        experiment.metric = 5
    experiment.metric = lambda logits: logits[:, -1, 3]
    assert experiment.run().value is not None
    experiment.metric = lambda logits: logits.argmax(-1)[:, -1].double()
    with pytest.raises(InputError, match="has no gradient"):
        experiment.attribution("q")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.run(top="x"), "top='x': give a number"),
        (lambda e: e.run(pos=[1]), "pos=list: give one position"),
        (lambda e: e.sweep(["q"]), "what=list"),
        (lambda e: e.sweep("q", by=["pos"]), "by=list"),
        (lambda e: e.condition(5), "named by a text, got 5"),
        (lambda e: e.condition("bos-mlp", layer="x"), "layer='x': a condition has one layer"),
        (lambda e: e.condition("bos-mlp", 3), "which=3"),
        (lambda e: e.measure(5), "named by a text, got int"),
        (lambda e: e.patch("resid", layer=1), "'resid' is a kind of activation"),
        (lambda e: e.ablate(what="mlp", value=[1, 2]), "value=list: write"),
        (lambda e: logit_diff(e.lens, "e", "o", pos="x"), "pos='x'; give one position"),
    ],
)
def test_values_of_a_wrong_type_are_refused_in_words(experiment, call, message):
    with pytest.raises(InputError, match=message):
        call(experiment)
    assert not experiment.patched()


def test_run_tells_next_tokens_loss_and_metric(experiment):
    experiment.patch(what="resid", layer=0)
    told = experiment.run(top=3, pos=-2)
    logits = {
        name: experiment.lens.stream(one.tokens, unembed=True)
        for name, one in (("clean", experiment.clean), ("corrupt", experiment.corrupt))
    }
    expected = logits["corrupt"][0, -2].softmax(-1).topk(3)
    assert [token.before for token in told.top_before] == pytest.approx(expected.values.tolist())
    assert [token.after for token in told.top_after] == pytest.approx(
        logits["clean"][0, -2].softmax(-1).topk(3).values.tolist()
    )
    assert told.value == pytest.approx((float(experiment.metric(logits["corrupt"], None)), told.clean))
    by_hand = (
        -logits["corrupt"][0, :-1].log_softmax(-1).gather(-1, experiment.corrupt.tokens[0, 1:, None]).mean()
    )
    assert told.loss[0] == pytest.approx(float(by_hand))
    assert f"{told.loss[0]:.4f} → {told.loss[1]:.4f}" in str(told)


def test_without_a_corrupt_prompt_the_clean_run_is_edited():
    alone = Experiment(prompt(lens_of("llama"), "to be"))
    alone.ablate(what="mlp", layer=0)
    told = alone.run()
    assert told.run == "clean"
    assert told.loss[0] != told.loss[1]
    assert told.value is None
    alone.undo()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({}, "name a hook point"),
        ({"point": "blocks.1.hook_resid_pst"}, "did you mean blocks.1.hook_resid_post"),
        ({"point": "blocks.9.hook_resid_post"}, "has no hook point"),
        (
            {"point": "nonsense"},
            r"^llama has no hook point 'nonsense'; describe_hooks\(\) of the model lists all of them$",
        ),
        ({"point": "blocks.1.attn.hook_sink"}, "is a measurement"),
        ({"point": "blocks.1.hook_mlp_out", "layer": 1}, "names its layer"),
        ({"point": "blocks.1.hook_mlp_out", "what": "mlp"}, "both say where"),
        ({"point": "blocks.1.hook_mlp_out", "head": 1}, "has no heads"),
        ({"point": "blocks.1.attn.hook_cos"}, "InputError|cos"),
        ({"what": "mlp", "layer": 3}, "layer 3: llama has 3, 0 to 2"),
        ({"what": "mlp", "layer": range(8)}, "layer 3: llama has 3"),
        ({"what": "mlp", "layer": []}, "none is named"),
        ({"what": "mlp", "pos": 9}, "pos 9: the prompt has 9, 0 to 8"),
        ({"what": "mlp", "pos": "last"}, "pos='last'"),
        ({"what": "mlp", "pos": True}, "whole numbers"),
        ({"what": "mlp", "pos": 1.5}, "whole numbers"),
        ({"what": "head", "head": 4}, "head 4: blocks.0.attn.hook_z has 4"),
        ({"what": "mpl"}, "did you mean mlp"),
        ({"point": 3}, "a hook point is a text"),
    ],
)
def test_a_place_that_is_not_there_is_said_in_one_line(experiment, place, message):
    if message == "InputError|cos":
        experiment.patch(**place)  # [1, pos, d]: it has a row for each position
        return
    with pytest.raises(InputError, match=message) as error:
        experiment.patch(**place)
    assert "\n" not in str(error.value)
    assert not experiment.patched()


@pytest.mark.parametrize("value", ["average", None, True, float("nan"), float("inf")])
def test_an_ablation_writes_only_numbers(experiment, value):
    with pytest.raises(InputError, match="write 'zero', 'mean' or a number"):
        experiment.ablate(what="mlp", value=value)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("patch('blocks.1.hook_mlp_out', pos=5)", lambda e: e.patch("blocks.1.hook_mlp_out", pos=5)),
        ("patch(layer=range(0, 2), what='resid')", lambda e: e.patch(layer=range(2), pos="all", what="resid")),
        ("ablate(layer=1, head=[0, 2], what='head', value='mean')",
         lambda e: e.ablate(what="head", layer=1, head=(0, 2), value="mean")),
        ("nope(layer=[0, 2])", lambda e: e.nope((0, 2))),
    ],
)  # fmt: skip
def test_an_edit_knows_the_call_that_makes_it_again(experiment, code, make):
    edit = make(experiment)
    assert edit.code == code
    experiment.undo()
    again = eval(f"experiment.{code}", {"experiment": experiment})
    assert again == edit


def test_logit_diff_is_of_single_tokens():
    lens = lens_of("llama")
    with pytest.raises(InputError, match=r"'be' is 2 tokens for llama: 'b' 'e'"):
        logit_diff(lens, "be", "o")
    with pytest.raises(InputError, match="the same token"):
        logit_diff(lens, "e", 16)
    with pytest.raises(InputError, match="knows 0 to 66"):
        logit_diff(lens, 67, 1)
    logits = torch.arange(2 * 3 * 67.0).reshape(2, 3, 67) ** 2
    found = logit_diff(lens, 5, 9, pos=1)(logits, torch.zeros(1, 3))
    assert found.tolist() == (logits[:, 1, 5] - logits[:, 1, 9]).tolist()
    with pytest.raises(InputError, match="one token, so none is predicted"):
        loss(logits[:, :1], torch.zeros(1, 1, dtype=torch.long))
