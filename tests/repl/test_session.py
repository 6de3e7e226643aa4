"""The verbs, typed into IPython: what they print is what the API says, and every error is one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phaselens.patching import Experiment, agreement, logit_diff, prompt
from tests.marks import first_quick


def test_prompts_are_shown_side_by_side_as_soon_as_there_are_two(lines):
    out, _ = lines('clean = m.prompt("to be")')
    assert out.startswith("6 tokens of 'rope': 0'<s>'")
    out, _ = lines('corrupt = m.prompt("to do")')
    assert "   4  'b'    ≠ 'd'" in out
    assert lines("1 + 1")[0].endswith("2\n")


def test_a_difference_in_length_is_one_line_that_says_where(lines):
    lines('clean = m.prompt("to be")')
    out, error = lines('corrupt = m.prompt("to see")')
    assert out == ""
    assert error == (
        "error: clean has 6 tokens and corrupt 7: they part at position 4, where clean reads 'b' and corrupt reads "
        "'s' 'e'; choose words of as many tokens\n"
    )
    assert lines("run()")[1] == error


def test_run_prints_what_the_api_finds(ready, shell):
    out, error = ready('patch("blocks.1.hook_resid_post", pos=4)', "run()")
    assert error == ""
    lens = shell.user_ns["m"]
    experiment = Experiment(prompt(lens, "to be or"), prompt(lens, "to do or"), logit_diff(lens, "e", "o"))
    experiment.patch("blocks.1.hook_resid_post", pos=4)
    expected = str(experiment.run())
    assert out == f"1. {experiment.patched()[0]}\n{expected}\n"
    assert str(shell.user_ns["result"]) == expected


def test_the_stack_of_edits(ready):
    ready('patch(what="resid", layer=range(2))', 'ablate(what="mlp", layer=1, pos=0)', "nope(1)")
    out, _ = ready("patched()")
    assert [line[:3] for line in out.splitlines()] == ["1. ", "2. ", "3. "]
    assert ready("undo()")[0] == "undone: rotation of layer 1 nulled\n"
    ready("undo()", "undo()")
    assert ready("patched()")[0] == "no edits\n"
    assert ready("undo()")[1] == "error: undo: there is no edit to take back\n"


@pytest.mark.slow
def test_a_sweep_is_a_heatmap_and_a_figure(ready, shell):
    out, error = ready('sweep("head")')
    assert error == ""
    assert out.startswith("head: patching, layer × head\neffect on logit_diff('e', 'o'); the whole way is ")
    found = shell.user_ns["result"]
    assert f"{found.effect[2, 1]:+8.4f}" in out
    path = Path(re.search(r"^figure: (.+)$", out, re.MULTILINE)[1])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.name == "1-sweep-head.png"
    assert ready('sweep("q", "k", by="head", file="both.svg")')[1] == ""
    assert Path("both.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_attribution_says_how_far_it_agrees_once_both_are_known(ready, shell):
    out, _ = ready('attribution("v")')
    assert "attribution against patching" not in out
    first = shell.user_ns["result"]
    out, _ = ready('sweep("v")')
    assert str(agreement(shell.user_ns["result"], first)) in out
    ready('patch(what="mlp", layer=0)')
    assert "attribution against patching" not in ready('sweep("v")')[0]


def test_rope_is_a_model_and_a_verb(ready, shell):
    assert ready("rope")[0].endswith(
        "rope: LlamaForCausalLM, 3 layers, 4 heads, d_model 32, positions rope, float32 on cpu\n"
    )
    ready("nope()")
    assert ready("patched()")[0] == "1. rotation of layers 0–2 nulled\n"
    assert ready("rope(1)")[0] == "2. rotation of layer 1 restored\n"
    assert ready("rope(layer=[0, 2])")[0] == "3. rotation of layers 0, 2 restored\n"
    assert ready("rope()")[1].startswith("error: rope: no rotation was nulled in layers 0–2")
    assert ready("rope(clean.tokens).shape")[0].endswith("torch.Size([1, 9, 67])\n")


def test_rotation_can_be_switched_before_there_is_a_prompt(lines):
    assert lines("nope(2)")[0] == "1. rotation of layer 2 nulled\n"
    assert lines("run()")[1].startswith("error: there is no prompt yet; write clean = m.prompt(")
    lines('clean = m.prompt("to be")')
    assert lines("patched()")[0] == "1. rotation of layer 2 nulled\n"
    assert lines("undo()")[1] == ""


def test_each_model_has_its_own_edits(ready):
    ready('patch(what="mlp", layer=1)')
    _, error = ready('clean = models["other-model"].prompt("to be or")')
    assert error.startswith("error: clean is a prompt of 'other-model' and corrupt of 'rope'")
    ready('corrupt = models["other-model"].prompt("to do or")')
    assert ready("patched()")[0] == "no edits\n"
    assert ready("metric()")[0] == "metric: logit_diff('e', 'o')\n"
    assert ready("nope()")[1].startswith("error: gpt2: positions=nope cannot be served")
    ready('clean = m.prompt("to be")', 'corrupt = m.prompt("to do")')
    assert ready("patched()")[0].startswith("1. patch blocks.1.hook_mlp_out")


@pytest.mark.slow
def test_metrics_and_conditions_by_name(ready):
    out, _ = ready('metric("sinks", threshold=0.2)')
    assert out.startswith("sinks: sink_rate, share of heads\nlayer")
    out, error = ready('condition("bos-mlp", layer=1)', "run()")
    assert error == ""
    assert "1. condition bos-mlp: " in out
    assert "sinks: sink_rate" in out
    assert ready("metric()")[0] == "metric: logit_diff('e', 'o')\nshown by run(): sinks\n"
    ready('metric("loss")')
    assert ready("metric()")[0].startswith("metric: loss\n")
    ready("metric(lambda logits: logits[:, -1, 3])")
    assert ready('sweep("attn")')[1] == ""


@pytest.mark.parametrize(
    ("line", "said"),
    first_quick([
        ("patc()", "error: NameError: name 'patc' is not defined (%tb shows where)"),
        ("1 +", "error: SyntaxError: invalid syntax: 1 +"),
        ("1/0", "error: ZeroDivisionError: division by zero (%tb shows where)"),
        ("indented = (1,\n 2))", "error: SyntaxError: unmatched ')': 2))"),
        ("if m:\nrun()", "error: IndentationError: expected an indented block after 'if' statement on line 1: run()"),
        ('patch("blocks.1.hook_mlp_ot")', "error: rope has no hook point 'blocks.1.hook_mlp_ot'; did you mean"),
        ("patch(layer=range(8), what='resid')", "error: layer 3: rope has 3, 0 to 2"),
        ("patch()", "error: name a hook point ('blocks.3.hook_resid_post') or a kind of activation (what='resid')"),
        ("sweep('resi')", "error: what='resi'; did you mean resid?"),
        ("logit_diff('be', 'o')", "error: 'be' is 2 tokens for rope: 'b' 'e'; name a text of one token"),
        ("guide('swep')", "error: guide: no verb 'swep'; did you mean sweep?"),
        ("sweep('mlp', file='/proc/none/a.png')", "error: the figure cannot be written to /proc/none/a.png"),
        ("%save_session", "error: save_session: name a file, %save_session FILE.py"),
        ("raise KeyboardInterrupt", "interrupted"),
        ("raise ValueError('a\\nb\\x1b[31m')", "error: ValueError: a b\\x1b[31m (%tb shows where)"),
    ], 4),
)  # fmt: skip
def test_an_error_is_one_line_and_the_session_goes_on(ready, line, said):
    _, error = ready(line)
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert ready("run()")[1] == ""


def test_the_whole_traceback_can_be_asked_for(ready):
    ready("1/0")
    out, error = ready("%tb")
    assert "Traceback (most recent call last)" in out + error


@pytest.mark.slow
def test_ctrl_c_keeps_what_a_sweep_has_done(ready, shell, monkeypatch):
    from phaselens.report.progress import ProgressBar

    def advance(self: ProgressBar, n_tokens: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "advance", advance)
    out, error = ready('sweep("head")')
    assert error == ""
    assert "stopped after 4 of 12 cells" in out
    assert shell.user_ns["result"].n_done == 4
    assert out.count("·") == 8
    monkeypatch.undo()
    assert "stopped" not in ready('sweep("head")')[0]


def test_help_for_each_name(lines, shell):
    from phaselens.repl.session import VERBS

    out, _ = lines("guide()")
    verbs = [verb for group in VERBS.values() for verb in group]
    for verb in verbs:
        assert re.search(rf"^  {verb} +\S", out, re.MULTILINE), verb
        explained, error = lines(f"guide({verb!r})")
        assert error == ""
        assert explained.startswith(f"{'rope' if verb == 'rope' else verb}(")
        assert shell.object_inspect(verb)["docstring"]
    assert "%save_session" in out
    assert lines("guide(sweep)")[0].startswith("sweep(*what, by=None, layer=None, file=None)")
    assert lines('guide("other-model")')[0].startswith("other-model: GPT2LMHeadModel")
    assert "Write a script" in shell.object_inspect("%save_session")["docstring"]


def test_what_is_found_shows_itself_as_it_prints(ready):
    ready('sweep("head")')
    assert "head: patching, layer × head\nlogit_diff('e', 'o'): corrupt" in ready("result")[0]
    assert "9 tokens of 'rope'" in ready("clean")[0]


def test_transformer_lens_works_on_a_sessions_model(ready):
    out, error = ready(
        'logits, cache = m.run_with_cache("to be")', "logits.shape", 'cache["resid_pre", 1].shape'
    )
    assert error == ""
    assert "torch.Size([1, 6, 67])" in out
