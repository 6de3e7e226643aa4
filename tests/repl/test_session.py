"""The verbs, typed into IPython: they print the results of the API, and every error is one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phaselens.patching import Experiment, agreement, logit_diff, prompt
from tests.marks import mark_later_slow
from tests.patching.test_plugin_metrics import metrics_with_null


@pytest.mark.slow
def test_two_prompts_are_shown_side_by_side(lines):
    out, _ = lines('clean = m.prompt("to be")')
    assert out.startswith("6 tokens of 'rope': 0'<s>'")
    out, _ = lines('corrupt = m.prompt("to do")')
    assert "   4  'b'    ≠ 'd'" in out
    assert lines("1 + 1")[0].endswith("2\n")


def test_a_difference_in_length_is_one_line_with_the_position(lines):
    lines('clean = m.prompt("to be")')
    out, error = lines('corrupt = m.prompt("to see")')
    assert out == ""
    assert error == (
        "error: clean has 6 tokens and corrupt 7: they diverge at position 4, where clean reads 'b' and corrupt reads "
        "'s' 'e'; use prompts with the same number of tokens\n"
    )
    assert lines("run()")[1] == error


def test_run_prints_the_result_of_the_api(ready, shell):
    out, error = ready('patch("blocks.1.hook_resid_post", pos=4)', "run()")
    assert error == ""
    lens = shell.user_ns["m"]
    experiment = Experiment(prompt(lens, "to be or"), prompt(lens, "to do or"), logit_diff(lens, "e", "o"))
    experiment.patch("blocks.1.hook_resid_post", pos=4)
    expected = str(experiment.run())
    assert out == f"1. {experiment.patched()[0]}\n{expected}\n"
    assert str(shell.user_ns["result"]) == expected


def test_edits_are_listed_and_undone(ready):
    ready('patch(what="resid", layer=range(2))', 'ablate(what="mlp", layer=1, pos=0)', "null_rope(1)")
    out, _ = ready("patched()")
    assert [line[:3] for line in out.splitlines()] == ["1. ", "2. ", "3. "]
    assert ready("undo()")[0] == "undone: rotation of layer 1 nulled\n"
    ready("undo()", "undo()")
    assert ready("patched()")[0] == "no edits\n"
    assert ready("undo()")[1] == "error: undo: there is no edit to undo\n"


@pytest.mark.slow
def test_a_sweep_is_a_heatmap_and_a_figure(ready, shell):
    out, error = ready('sweep("head")')
    assert error == ""
    assert out.startswith(
        "head: patching, layer × head\neffect on logit_diff('e', 'o'); the full difference is "
    )
    swept = shell.user_ns["result"]
    assert f"{swept.effect[2, 1]:+8.4f}" in out
    path = Path(re.search(r"^figure: (.+)$", out, re.MULTILINE)[1])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.name == "1-sweep-head.png"
    assert ready('sweep("q", "k", by="head", file="both.svg")')[1] == ""
    assert Path("both.svg").read_text().startswith("<?xml")


def test_the_residual_stream_is_read_with_the_edits_and_the_tokens_of_the_metric(ready, shell):
    out, error = ready("logit_lens(top=2)")
    assert error == ""
    assert out.startswith("logit lens of 'rope', next token after position ")
    out, error = ready('logit_diff("e", "o")', "direct_logit_attribution()")
    assert error == ""
    assert "direct attribution of logit of 'e' − 'o'" in out
    assert shell.user_ns["result"].heads.shape == (3, 4)
    assert "did you mean pos=1?" in ready("logit_lens(position=1)")[1]


@pytest.mark.slow
def test_the_correlation_is_printed_once_there_are_a_sweep_and_an_attribution(ready, shell):
    out, _ = ready('attribution("v")')
    assert "attribution against patching" not in out
    first = shell.user_ns["result"]
    out, _ = ready('sweep("v")')
    assert str(agreement(shell.user_ns["result"], first)) in out
    ready('patch(what="mlp", layer=0)')
    assert "attribution against patching" not in ready('sweep("v")')[0]


def test_rope_is_a_model_and_restore_rope_a_verb(ready):
    assert ready("rope")[0].endswith(
        "rope: LlamaForCausalLM, 3 layers, 4 heads, d_model 32, positions rope, float32 on cpu\n"
    )
    ready("null_rope()")
    assert ready("patched()")[0] == "1. rotation of layers 0–2 nulled\n"
    assert ready("restore_rope(1)")[0] == "2. rotation of layer 1 restored\n"
    assert ready("restore_rope(layer=[0, 2])")[0] == "3. rotation of layers 0, 2 restored\n"
    assert ready("restore_rope()")[1].startswith("error: restore_rope: no rotation was nulled in layers 0–2")
    assert ready("rope(2)") == (
        "",
        "error: rope is a model; call it on a text or tokens, or write restore_rope(2) to restore a rotation\n",
    )
    assert ready("rope(clean.tokens).shape")[0].endswith("torch.Size([1, 9, 67])\n")


def test_nope_is_an_alias_that_names_the_verb(ready, shell):
    out, error = ready("nope(2)")
    assert (out, error) == ("note: nope is now null_rope\n1. rotation of layer 2 nulled\n", "")
    assert shell.session.experiment.patched()[0].code == "null_rope(layer=2)"
    assert "nope is now null_rope" in ready('guide("nope")')[0]
    assert not re.search(r"^  nope ", ready("guide()")[0], re.MULTILINE)


def test_rotation_can_be_switched_before_there_is_a_prompt(lines):
    assert lines("null_rope(2)")[0] == "1. rotation of layer 2 nulled\n"
    assert lines("run()")[1].startswith("error: there is no prompt yet; write clean = m.prompt(")
    lines('clean = m.prompt("to be")')
    assert lines("patched()")[0] == "1. rotation of layer 2 nulled\n"
    assert lines("undo()")[1] == ""


def test_each_model_has_its_own_edits(ready):
    ready('patch(what="mlp", layer=1)')
    out, error = ready('clean = models["other-model"].prompt("to be or")')
    assert (out.splitlines()[-1], error) == (
        "corrupt is still the earlier prompt, of 'rope'; assign corrupt too",
        "",
    )
    assert ready("run()")[1].startswith("error: clean is a prompt of 'other-model' and corrupt of 'rope'")
    ready('corrupt = models["other-model"].prompt("to do or")')
    assert ready("patched()")[0] == "no edits\n"
    assert ready("metric()")[0] == "metric: logit_diff('e', 'o')\n"
    assert ready("null_rope()")[1].startswith("error: gpt2: positions=nope cannot be served")
    ready('clean = m.prompt("to be")', 'corrupt = m.prompt("to do")')
    assert ready("patched()")[0].startswith("1. patch blocks.1.hook_mlp_out")


@pytest.mark.slow
def test_metrics_and_conditions_are_accepted_by_name(ready):
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
    ("line", "message"),
    mark_later_slow([
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
def test_an_error_is_one_line_and_the_session_goes_on(ready, line, message):
    _, error = ready(line)
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert ready("run()")[1] == ""


def test_the_magic_tb_shows_the_traceback(ready):
    ready("1/0")
    out, error = ready("%tb")
    assert "Traceback (most recent call last)" in out + error


@pytest.mark.slow
def test_ctrl_c_keeps_the_cells_that_a_sweep_has_measured(ready, shell, monkeypatch):
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


def test_guide_explains_each_name(lines, shell):
    from phaselens.repl.session import VERBS

    out, _ = lines("guide()")
    verbs = [verb for group in VERBS.values() for verb in group]
    for verb in verbs:
        assert re.search(rf"^  {verb} +\S", out, re.MULTILINE), verb
        explained, error = lines(f"guide({verb!r})")
        assert error == ""
        assert explained.startswith(f"{verb}(")
        assert shell.object_inspect(verb)["docstring"]
    assert "%save_session" in out
    assert lines("guide(sweep)")[0].startswith("sweep(what='resid', *more, by=None, layer=None, file=None)")
    assert lines("guide(m)")[0].startswith("rope: LlamaForCausalLM")
    assert lines('guide("other-model")')[0].startswith("other-model: GPT2LMHeadModel")
    assert "Write a script" in shell.object_inspect("%save_session")["docstring"]


def test_the_repr_of_results_and_prompts_is_their_text(ready):
    ready('sweep("head")')
    assert "head: patching, layer × head\nlogit_diff('e', 'o'): corrupt" in ready("result")[0]
    assert "9 tokens of 'rope'" in ready("clean")[0]


def test_transformer_lens_works_on_a_sessions_model(ready):
    out, error = ready(
        'logits, cache = m.run_with_cache("to be")', "logits.shape", 'cache["resid_pre", 1].shape'
    )
    assert error == ""
    assert "torch.Size([1, 6, 67])" in out


LONG = ('clean = m.prompt("to be or not")', 'corrupt = m.prompt("to do or not")')


def test_between_two_assignments_of_another_length_there_is_no_error(ready):
    for clean, corrupt in (("to be", "to do"), ("to be or not", "to do or not")):
        out, error = ready(f"clean = m.prompt({clean!r})")
        assert error == ""
        assert "corrupt is still the earlier prompt, of " in out.splitlines()[-1]
        out, error = ready(f"corrupt = m.prompt({corrupt!r})")
        assert error == ""
        assert out.startswith(" pos  clean  corrupt\n")
    out, error = ready('corrupt = m.prompt("to do")')
    assert (out.splitlines()[-1], error) == (
        "clean is still the earlier prompt, of 13 tokens; assign clean too",
        "",
    )
    assert ready('clean = m.prompt("to be or")')[1].startswith("error: clean has 9 tokens and corrupt 6")


def test_new_prompts_print_which_edits_stop_or_start_to_fit(ready):
    ready(
        *LONG,
        'ablate(what="mlp", layer=0)',
        'patch(what="resid", layer=1, pos=12)',
        'patch(what="q", pos=[11])',
    )
    out, error = ready('clean = m.prompt("to be")', 'corrupt = m.prompt("to do")')
    assert error == ""
    note = (
        "note: set aside, the prompts have 6 tokens: edits 2, 3 "
        "(applied again once prompts fit; patched() lists all)"
    )
    assert out.splitlines()[-1] == note
    out, error = ready("run()")
    assert "after 1 edit\n" in out
    assert out.count("set aside: ") == 2
    assert "set aside: 3. patch blocks.0.attn.hook_q" in ready('sweep("head", layer=0)')[0]
    assert ready("undo()") == ("undone: patch blocks.0.attn.hook_q … 2 (3 layers) at position 11 from the clean run "
                               "(it was set aside)\n", "")  # fmt: skip
    assert ready(*LONG)[0].splitlines()[-1] == "note: applied again: edit 2"
    assert "set aside" not in ready("patched()", "run()")[0]
    assert "set aside, there is no corrupt prompt: edit 2 " in ready("corrupt = None")[0]


def test_a_model_without_the_tokens_of_the_metric_is_measured_by_the_loss(ready, shell):
    """The verbs work on such a model."""
    shell.session._logit_diff_arguments = (" he", " she", -1)
    out, error = ready(
        'clean, corrupt = (models["other-model"].prompt(text) for text in ("to be", "to do"))',
        "patched()",
        "run()",
    )
    assert error == ""
    assert "note: runs of other-model are measured by the loss: ' he' is 3 tokens" in out


def test_labels_with_another_meaning_are_not_bound(lenses, tmp_path):
    from phaselens.repl.session import Session

    for label in ("clean", "corrupt", "result", "print", "m", "undo"):
        session = Session({label: lenses["other-model"]}, str(tmp_path), quiet=True)
        assert session.names.get(label) is not lenses["other-model"] or label == "m"
        session.names["patched"]()
        assert session.mismatch.startswith("there is no prompt yet")


@pytest.mark.slow
@pytest.mark.parametrize("name", metrics_with_null())
def test_every_metric_shows_the_null_of_each_run(ready, shell, name):
    out, error = ready(f"metric({name!r})")
    assert error == ""
    measured = shell.user_ns["result"]
    assert out == f"{measured}\n"
    assert out.splitlines()[1].split() == ["layer", "before", "null", "after", "null", "clean", "null"]
    assert [row[0] for row in measured.nulls] == [row[0] for row in measured.rows] == [0, 1, 2]
    assert None not in (number for row in measured.nulls for number in row)


def test_a_table_of_a_metric_shows_the_null_of_each_run(ready):
    out, _ = ready('metric("bos-norm")')
    assert out.splitlines()[1].split() == ["layer", "before", "null", "after", "null", "clean", "null"]
    assert out.splitlines()[2].split()[2::2] == ["1.0000"] * 3
    assert "null" in ready("run()")[0]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sweep", "attribution"])
@pytest.mark.parametrize("what", ["resid", "head"])
def test_a_sweep_equals_that_of_the_api(ready, shell, verb, what):
    assert ready("patch(what='mlp', layer=0, pos=4)", f"{verb}(what={what!r})")[1] == ""
    result, lens = shell.user_ns["result"], shell.user_ns["m"]
    experiment = Experiment(prompt(lens, "to be or"), prompt(lens, "to do or"), logit_diff(lens, "e", "o"))
    experiment.patch(what="mlp", layer=0, pos=4)
    expected = getattr(experiment, verb)(what)
    assert (result.what, result.by, result.kind) == (what, expected.by, expected.kind)
    assert (result.base, result.clean) == (expected.base, expected.clean)
    assert result.values.tolist() == expected.values.tolist()
    assert result.effect.any()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sweep", "attribution"])
def test_kinds_are_named_as_in_the_api(ready, shell, verb):
    ready(f"{verb}('q', layer=0)")
    first = shell.user_ns["result"]
    assert ready(f"{verb}(what='q', layer=0)")[1] == ""
    assert (shell.user_ns["result"].values == first.values).all()
    assert ready(f"{verb}(what=['q', 'k'], layer=0)")[1] == ""
    assert shell.user_ns["result"].what == "k"


@pytest.mark.slow
def test_sweeps_of_two_functions_are_not_compared(ready):
    ready("metric(lambda logits: logits[:, -1, 3])", 'sweep("v", layer=0)')
    out, _ = ready("metric(lambda logits: logits[:, -1, 4])", 'attribution("v", layer=0)')
    assert "attribution against patching" not in out
    assert "attribution against patching" in ready('sweep("v", layer=0)')[0]
