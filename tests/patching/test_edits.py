"""Edits, their stack, and the errors for edits that are impossible."""

from __future__ import annotations

import pytest
import torch

from phaselens.errors import InputError, RefusedModel
from phaselens.patching import Experiment, agreement, logit_diff, loss, prompt
from tests.patching.conftest import experiment_of, lens_of


def activation(
    experiment: Experiment, name: str, *, edited: bool = True, clean: bool = False
) -> torch.Tensor:
    """Return the activation at a point after all hooks, in one run."""
    activations = {}
    hooks = experiment.hooks() if edited else []
    tokens = (experiment.clean if clean else experiment.edited).tokens
    experiment.lens.stream(
        tokens, [*hooks, (name, lambda value, hook: activations.__setitem__(name, value.clone()))]
    )
    return activations[name]


@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_mid", "blocks.2.attn.hook_k", "blocks.0.mlp.hook_post"]
)
def test_a_patch_writes_the_clean_run_at_its_positions_and_nowhere_else(experiment, name):
    before = activation(experiment, name)
    clean = activation(experiment, name, edited=False, clean=True)
    experiment.patch(name, pos=[4, -1])
    after = activation(experiment, name)
    assert torch.equal(after[:, [4, 8]], clean[:, [4, 8]])
    unpatched = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(after[:, unpatched], before[:, unpatched])
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
    ("arguments", "message"),
    [
        (
            {"what": "pattern", "layer": 1},
            "blocks.1.attn.hook_pattern: value='mean': the mean of its rows over queries lets a query attend to "
            "later keys; give 'zero' or a number, or ablate hook_z or hook_v of the layer to their mean",
        ),
        (
            {"point": "blocks.0.attn.hook_attn_scores", "pos": 3, "head": 1},
            "blocks.0.attn.hook_attn_scores: value='mean': the mean of its rows over queries is -inf for every key "
            "that is hidden from one of them; give 'zero' or a number, or ablate hook_z or hook_v of the layer to "
            "their mean",
        ),
    ],
)
def test_attention_rows_have_no_mean_over_queries(experiment, arguments, message):
    """The activations confirm what the two messages say."""
    name = arguments.get("point", "blocks.1.attn.hook_pattern")
    mean = activation(experiment, name).mean(2)
    assert bool((mean[..., 1:] == -torch.inf).all() if "scores" in name else (mean > 0).all())
    with pytest.raises(InputError) as error:
        experiment.ablate(**arguments, value="mean")
    assert str(error.value) == message
    assert not experiment.patched()
    for instead in ({"value": 0.5}, {"value": "zero"}):
        experiment.ablate(**arguments, **instead)
    for point in ("hook_z", "hook_v"):
        experiment.ablate(f"blocks.1.attn.{point}", value="mean")


def attention_without(
    experiment: Experiment, keys: list[int], heads: list[int] | None = None
) -> torch.Tensor:
    """Return layer 1's attention with the keys removed from the matrix, for the queries after each."""
    scores = activation(experiment, "blocks.1.attn.hook_attn_scores", edited=False).clone()
    for key in keys:
        scores[:, slice(None) if heads is None else heads, key + 1 :, key] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.slow
def test_the_sink_is_ablated_by_removing_the_key_from_later_queries(experiment):
    name = "blocks.1.attn.hook_pattern"
    experiment.ablate(what="sink", layer=1)
    assert str(experiment.patched()) == "1. ablate blocks.1.attn.hook_key_scores at all positions to -inf"
    torch.testing.assert_close(activation(experiment, name), attention_without(experiment, [0]))
    experiment.undo()
    experiment.ablate(what="sink", layer=1, head=2, key=[0, -4])
    assert experiment.patched()[0].code == "ablate(layer=1, head=2, key=[0, -4], what='sink')"
    torch.testing.assert_close(activation(experiment, name), attention_without(experiment, [0, 5], [2]))


def test_scores_of_a_key_have_no_mean(experiment):
    with pytest.raises(InputError, match="give 'zero', which removes the key, or a number"):
        experiment.ablate(what="sink", layer=1, value="mean")
    with pytest.raises(InputError, match=r"blocks.1.hook_mlp_out has no keys; leave key= out"):
        experiment.ablate(what="mlp", layer=1, key=0)
    experiment.ablate(what="sink", layer=1, value=-2.5)
    scores = activation(experiment, "blocks.1.attn.hook_attn_scores")
    assert bool((scores[:, :, 1:, 0] == -2.5).all())


def test_edits_of_different_keys_add_up(experiment):
    experiment.ablate(what="sink", layer=1)
    experiment.ablate(what="sink", layer=1, key=5, head=2)
    expected = attention_without(experiment, [0])
    expected[:, 2] = attention_without(experiment, [0, 5])[:, 2]
    torch.testing.assert_close(activation(experiment, "blocks.1.attn.hook_pattern"), expected)


def test_a_patch_of_the_sink_writes_the_clean_scores(experiment):
    """The edited column is the clean run's; the others stay."""
    name = "blocks.1.attn.hook_attn_scores"
    before, clean = activation(experiment, name), activation(experiment, name, edited=False, clean=True)
    experiment.patch(what="sink", layer=1, key=4, head=3, pos=[6, 7])
    after = activation(experiment, name)
    torch.testing.assert_close(after[0, 3, 6:8, 4], clean[0, 3, 6:8, 4])
    assert not torch.equal(after[0, 3, 6:8, 4], before[0, 3, 6:8, 4])
    after[0, 3, 6:8, 4] = before[0, 3, 6:8, 4]
    assert torch.equal(after, before)


def test_columns_of_a_pattern_are_ablated_by_key(experiment):
    name = "blocks.1.attn.hook_pattern"
    expected = activation(experiment, name).clone()
    experiment.ablate(what="pattern", layer=1, head=0, key=[0, 2])
    expected[:, 0, :, [0, 2]] = 0
    assert torch.equal(activation(experiment, name), expected)


def test_a_key_that_does_not_fit_sets_the_edit_aside():
    experiment = experiment_of()
    experiment.ablate(what="sink", layer=1, key=8)
    experiment.prompts(prompt(experiment.lens, "to"), None)
    assert experiment.patched().set_aside == (
        "1. ablate blocks.1.attn.hook_key_scores at all positions, key 8 to -inf (the prompts have 3 tokens)",
    )


def test_sweep_and_attribution_of_the_sink_agree_on_small_changes():
    experiment = experiment_of("llama-gqa")
    swept, estimated = experiment.sweep("sink"), experiment.attribution("sink")
    assert swept.values.shape == (3, 4)
    assert float(abs(swept.effect).max()) > 0
    assert agreement(swept, estimated).pearson > 0.7


def test_undo_removes_one_edit_at_a_time(experiment):
    unedited = experiment.values()[0]
    experiment.patch(what="resid", layer=1, pos=4)
    patched = experiment.values()[0]
    experiment.null_rope(2)
    experiment.ablate(what="head", layer=0)
    assert len({unedited, patched, experiment.values()[0]}) == 3
    assert [str(edit).split()[0] for edit in experiment.patched()] == ["patch", "rotation", "ablate"]
    experiment.undo()
    experiment.undo()
    assert experiment.values()[0] == patched
    assert experiment.lens.nulled_layers == ()
    experiment.undo()
    assert experiment.values()[0] == unedited
    assert str(experiment.patched()) == "no edits"
    with pytest.raises(InputError, match="there is no edit to undo"):
        experiment.undo()


def test_rotation_is_switched_live_and_run_shows_the_model_as_loaded_before(experiment):
    lens = experiment.lens
    rotated = lens.stream(experiment.corrupt.tokens)
    before = experiment.run()
    experiment.null_rope(range(2))
    assert not torch.allclose(lens.stream(experiment.corrupt.tokens), rotated)
    result = experiment.run()
    assert result.value[0] == before.value[0]
    assert result.value[1] != result.value[0]
    assert lens.nulled_layers == (0, 1)
    experiment.restore_rope(1)
    assert str(experiment.patched()[-1]) == "rotation of layer 1 restored"
    assert lens.nulled_layers == (0,)
    experiment.undo()
    assert lens.nulled_layers == (0, 1)
    with pytest.raises(InputError, match="no rotation was nulled in layer 2"):
        experiment.restore_rope(2)
    with pytest.raises(InputError, match="there is no rotation to null in layers 0, 1"):
        experiment.null_rope([0, 1])
    experiment.undo()


def test_the_old_names_of_the_rotation_verbs_warn_and_record_the_new_ones():
    experiment = experiment_of("llama")
    with pytest.warns(FutureWarning, match="nope is now null_rope"):
        assert str(experiment.nope(1)) == "rotation of layer 1 nulled"
    with pytest.warns(FutureWarning, match="rope is now restore_rope"):
        assert str(experiment.rope(1)) == "rotation of layer 1 restored"
    assert [edit.code for edit in experiment.patched()] == ["null_rope(layer=1)", "restore_rope(layer=1)"]
    assert experiment.lens.nulled_layers == ()


def test_learned_positions_are_not_a_rotation():
    experiment = experiment_of("gpt2")
    with pytest.raises(RefusedModel, match="only rotary models can be nulled"):
        experiment.null_rope()
    assert experiment.lens.nulled_layers == ()


def test_prompts_can_be_replaced_and_the_edits_stay(experiment):
    lens = experiment.lens
    new_prompts = prompt(lens, "a cat"), prompt(lens, "a dog")
    experiment.patch(what="resid", layer=0)
    experiment.prompts(*new_prompts)
    edited, clean = experiment.values()
    assert edited == pytest.approx(clean, abs=1e-12)


def test_an_edit_that_does_not_fit_is_set_aside_until_it_fits(experiment):
    lens = experiment.lens
    long_prompts = experiment.clean, experiment.corrupt
    short_prompts = prompt(lens, "a cat"), prompt(lens, "a dog")
    experiment.ablate(what="mlp", layer=1, pos=2)
    experiment.patch(what="resid", layer=0, pos=[1, 8])
    value_of_both = experiment.values()[0]
    experiment.prompts(*short_prompts)
    applied, set_aside = experiment.patched()
    assert (applied.set_aside, set_aside.set_aside) == (None, "the prompts have 6 tokens")
    assert str(experiment.patched()).splitlines()[1] == (
        "2. patch blocks.0.hook_resid_pre at positions 1, 8 from the clean run – set aside: the prompts have 6 tokens"
    )
    expected = Experiment(*short_prompts, experiment.metric)
    expected.ablate(what="mlp", layer=1, pos=2)
    result, swept = experiment.run(), experiment.sweep("head")
    assert result.value == expected.run().value
    assert result.edits == (str(applied),)
    assert result.set_aside == swept.set_aside == experiment.measure("sinks").set_aside
    assert "set aside: 2. patch blocks.0" in str(result)
    assert swept.base == expected.values()[0]
    experiment.prompts(*long_prompts)
    assert not experiment.patched().set_aside
    assert experiment.values()[0] == value_of_both


def test_an_edit_that_is_set_aside_can_be_undone(experiment):
    experiment.patch(what="resid", layer=0, pos=8)
    experiment.prompts(prompt(experiment.lens, "a"))
    assert experiment.patched().set_aside[0].endswith("(there is no corrupt prompt)")
    assert str(experiment.undo()).startswith("patch blocks.0.hook_resid_pre at position 8")
    assert not experiment.patched()


@pytest.mark.parametrize("text", ["a", "to be or not to be"])
def test_positions_from_the_end_are_those_of_the_current_prompt(experiment, text):
    """The positions equal those of the same call on the new prompt."""
    new_prompt = prompt(experiment.lens, text)
    experiment.ablate(what="mlp", layer=1, pos=-1)
    experiment.ablate(what="attn", layer=0, pos=[-2])
    experiment.prompts(new_prompt)
    fresh = Experiment(new_prompt, None, experiment.metric)
    for edit in experiment.patched():
        eval(f"fresh.{edit.code}", {"fresh": fresh})
    assert str(experiment.patched()) == str(fresh.patched())
    assert experiment.run().value == fresh.run().value
    assert f"at position {len(new_prompt) - 1} " in str(experiment.patched()[0])


def test_indices_may_be_any_whole_numbers_or_an_iterator(experiment):
    import numpy as np

    edit = experiment.patch(
        what="q", layer=np.int64(1), pos=(position for position in (3, 4)), head=np.array([0, 2])
    )
    assert edit.code == "patch(layer=1, pos=[3, 4], head=[0, 2], what='q')"
    assert edit.target.positions == (3, 4)
    assert experiment.ablate(what="mlp", value=np.float32(0.5)).code == "ablate(what='mlp', value=0.5)"


def test_run_leaves_out_a_metric_for_which_the_prompt_is_too_short(experiment):
    experiment.metric = logit_diff(experiment.lens, "e", "o", pos=20)
    result = experiment.run()
    assert result.value is None
    assert (
        result.reason
        == "logit_diff('e', 'o', pos=20) needs a prompt of 21 tokens or more, and this one has 9 tokens"
    )
    with pytest.raises(InputError, match="pos 20, but the prompt has 9 tokens"):
        experiment.sweep("head")


def test_a_metric_is_checked_when_it_is_set(experiment):
    with pytest.raises(InputError, match="expected a metric as logit_diff"):
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
        (lambda e: e.run(pos=[1]), r"pos=\[1\]: give one position"),
        (lambda e: e.sweep(["q"]), r"what=\['q'\]"),
        (lambda e: e.sweep("q", by=["pos"]), r"by=\['pos'\]"),
        (lambda e: e.condition(5), "name is 5; give the name of a causal metric"),
        (lambda e: e.condition("bos-mlp", layer="x"), "layer='x': a condition has one layer"),
        (lambda e: e.condition("bos-mlp", 3), "which=3"),
        (lambda e: e.measure(5), "name is 5; give the name of a metric"),
        (lambda e: e.patch("resid", layer=1), "'resid' is a kind of activation"),
        (lambda e: e.ablate(what="mlp", value=[1, 2]), r"value=\[1, 2\]: give"),
        (lambda e: logit_diff(e.lens, "e", "o", pos="x"), "pos='x'; give one position"),
    ],
)
def test_values_of_a_wrong_type_are_refused(experiment, call, message):
    with pytest.raises(InputError, match=message):
        call(experiment)
    assert not experiment.patched()


def test_run_returns_next_tokens_loss_and_metric(experiment):
    experiment.patch(what="resid", layer=0)
    result = experiment.run(top=3, pos=-2)
    logits = {
        name: experiment.lens.stream(prompt_of_run.tokens, unembed=True)
        for name, prompt_of_run in (("clean", experiment.clean), ("corrupt", experiment.corrupt))
    }
    expected = logits["corrupt"][0, -2].softmax(-1).topk(3)
    assert [token.before for token in result.top_before] == pytest.approx(expected.values.tolist())
    assert [token.after for token in result.top_after] == pytest.approx(
        logits["clean"][0, -2].softmax(-1).topk(3).values.tolist()
    )
    assert result.value == pytest.approx((float(experiment.metric(logits["corrupt"], None)), result.clean))
    by_hand = (
        -logits["corrupt"][0, :-1].log_softmax(-1).gather(-1, experiment.corrupt.tokens[0, 1:, None]).mean()
    )
    assert result.loss[0] == pytest.approx(float(by_hand))
    assert f"{result.loss[0]:.4f} → {result.loss[1]:.4f}" in str(result)


def test_without_a_corrupt_prompt_the_clean_run_is_edited():
    experiment = Experiment(prompt(lens_of("llama"), "to be"))
    experiment.ablate(what="mlp", layer=0)
    result = experiment.run()
    assert result.run == "clean"
    assert result.loss[0] != result.loss[1]
    assert result.value is None
    experiment.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name a hook point"),
        ({"point": "blocks.1.hook_resid_pst"}, "did you mean blocks.1.hook_resid_post"),
        ({"point": "blocks.9.hook_resid_post"}, "has no hook point"),
        (
            {"point": "nonsense"},
            r"^llama has no hook point 'nonsense'; describe_hooks\(\) of the model lists all of them$",
        ),
        ({"point": "blocks.1.attn.hook_sink"}, "it is a measurement that nothing in the model depends on"),
        ({"point": "blocks.1.hook_mlp_out", "layer": 1}, "names its layer"),
        ({"point": "blocks.1.hook_mlp_out", "what": "mlp"}, "both name activations"),
        ({"point": "blocks.1.hook_mlp_out", "head": 1}, "has no heads"),
        ({"point": "blocks.1.attn.hook_cos"}, "InputError|cos"),
        ({"what": "mlp", "layer": 3}, "layer 3: llama has 3, 0 to 2"),
        ({"what": "mlp", "layer": range(8)}, "layer 3: llama has 3"),
        ({"what": "mlp", "layer": []}, "the list is empty"),
        ({"what": "mlp", "pos": 9}, "pos 9: the prompt has 9, 0 to 8"),
        ({"what": "mlp", "pos": "last"}, "pos='last'"),
        ({"what": "mlp", "pos": True}, "whole numbers"),
        ({"what": "mlp", "pos": 1.5}, "whole numbers"),
        ({"what": "head", "head": 4}, "head 4: blocks.0.attn.hook_z has 4"),
        ({"what": "mpl"}, "did you mean mlp"),
        ({"point": 3}, "expected the name of a hook point as text"),
    ],
)
def test_the_error_for_a_target_that_does_not_exist_is_one_line(experiment, arguments, message):
    if message == "InputError|cos":
        experiment.patch(**arguments)  # [1, pos, d]: it has a row for each position
        return
    with pytest.raises(InputError, match=message) as error:
        experiment.patch(**arguments)
    assert "\n" not in str(error.value)
    assert not experiment.patched()


@pytest.mark.parametrize("value", ["average", None, True, float("nan"), float("inf")])
def test_an_ablation_writes_only_numbers(experiment, value):
    with pytest.raises(InputError, match="give 'zero', 'mean' or a number"):
        experiment.ablate(what="mlp", value=value)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("patch('blocks.1.hook_mlp_out', pos=5)", lambda e: e.patch("blocks.1.hook_mlp_out", pos=5)),
        ("patch(layer=range(0, 2), what='resid')", lambda e: e.patch(layer=range(2), pos="all", what="resid")),
        ("ablate(layer=1, head=[0, 2], what='head', value='mean')",
         lambda e: e.ablate(what="head", layer=1, head=(0, 2), value="mean")),
        ("null_rope(layer=[0, 2])", lambda e: e.null_rope((0, 2))),
    ],
)  # fmt: skip
def test_the_code_of_an_edit_recreates_it(experiment, code, make):
    edit = make(experiment)
    assert edit.code == code
    experiment.undo()
    recreated = eval(f"experiment.{code}", {"experiment": experiment})
    assert recreated == edit


def test_logit_diff_accepts_single_tokens_only():
    lens = lens_of("llama")
    with pytest.raises(InputError, match=r"'be' is 2 tokens for llama: 'b' 'e'"):
        logit_diff(lens, "be", "o")
    with pytest.raises(InputError, match="the same token"):
        logit_diff(lens, "e", 16)
    with pytest.raises(InputError, match="has tokens 0 to 66"):
        logit_diff(lens, 67, 1)
    logits = torch.arange(2 * 3 * 67.0).reshape(2, 3, 67) ** 2
    differences = logit_diff(lens, 5, 9, pos=1)(logits, torch.zeros(1, 3))
    assert differences.tolist() == (logits[:, 1, 5] - logits[:, 1, 9]).tolist()
    with pytest.raises(InputError, match="one token, so none is predicted"):
        loss(logits[:, :1], torch.zeros(1, 1, dtype=torch.long))
