"""A saved session is a script that runs in a new process and prints the same numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.patching import direct_logit_attribution, logit_lens
from phaselens.repl.script import script
from phaselens.repl.session import Session
from tests.marks import mark_later_slow
from tests.toys import save_checkpoint

STATE = """
clean = m.prompt("a b c d e f")
corrupt = m.prompt("a b x d e f")
logit_diff("g", "h")
patch("blocks.1.hook_resid_pre", pos=[3, -1])
ablate(what="head", layer=range(2), head=1, value="mean")
null_rope(1)
condition("bos-mlp", layer=0)
metric("bos-norm", massive_factor=3.0)
run()
sweep("v", by="pos-head", layer=[0, 1])
"""


def play(session: Session, state: str) -> None:
    for line in state.strip().splitlines():
        exec(line, session.names)


@pytest.mark.slow
def test_a_saved_session_reproduces_its_last_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "model")
    lens = phaselens.load(str(folder), label="toy")
    session = Session({"toy": lens}, str(tmp_path), quiet=True)
    play(session, STATE)
    text = script(session, {"toy": f"phaselens.load({str(folder)!r}, label='toy')"})
    expected = "\n".join(
        str(result)
        for result in (
            session.experiment.run(),
            session.experiment.measure("bos-norm", massive_factor=3.0),
            session.experiment.sweep("v", by="pos-head", layer=[0, 1]),
        )
    )
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"phaselens.patching"}
    capsys.readouterr()
    file = tmp_path / "state.py"
    file.write_text(text)
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    done = subprocess.run(
        [sys.executable, "-c", threads + file.read_text()],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_texts_are_escaped_so_that_they_cannot_become_code(lines, shell):
    lines("clean = m.prompt('a\"\\'\\n\\\\');import os")
    out, error = lines("%save_session state.py")
    assert (out, error) == ("written: state.py\n", "")
    tree = ast.parse(Path("state.py").read_text())
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert "a\"'\n\\" in texts
    assert "corrupt = None" in Path("state.py").read_text()


def test_a_file_that_cannot_be_written_is_an_error(lines):
    assert lines("%save_session no/such/folder/state.py")[1].startswith(
        "error: save_session: no/such/folder/state.py cannot"
    )
    assert lines("%save_session state.py")[0] == "written: state.py\n"


def test_a_metric_that_closes_over_the_session_is_named_in_a_comment(lines):
    lines(
        'clean = m.prompt("to be")',
        'corrupt = m.prompt("to do")',
        "class Third:\n    def __call__(self, logits): return logits[:, -1, 3]",
    )
    out, error = lines("third = Third()", "metric(third)", 'sweep("attn", layer=0)', "%save_session state.py")
    assert error == ""
    assert out.endswith(
        "written: state.py\nnote: the script lacks the metric metric, which exists in this session only\n"
    )
    text = Path("state.py").read_text()
    assert "# The metric metric exists in the session only: define it here" in text
    assert "\n# print(experiment.sweep('attn', layer=0))\n" in text


LONG = ('clean = m.prompt("to be or not")', 'corrupt = m.prompt("to do or not")')
SHORT = ('clean = m.prompt("to be")', 'corrupt = m.prompt("to do")')
EDITS = ("null_rope(1)", 'ablate(what="mlp", layer=0, pos=-1)',
         "patch(what='resid', layer=1, pos=(i for i in (10, 12)))",
         "patch(what='head', layer=2, head=1)", "patch('blocks.2.hook_mlp_out', pos=-9)")  # fmt: skip
STATES = {
    "set aside": (*LONG, "logit_diff('e', 'o', pos=-2)", *EDITS, *SHORT, "run()", "attribution('head')"),
    "made on two lengths": (*LONG, EDITS[2], *SHORT, EDITS[1], *LONG, EDITS[4], "corrupt = None", *SHORT, "run()"),
    "half assigned": (*LONG, *EDITS, SHORT[0]),
    "a function": (*SHORT, "import math; shift = 2.0", "def third(logits): return logits[:, -1, 3] * math.sqrt(shift)",
                   "metric(third)", "run()", "sweep('attn', layer=0)"),
    "nothing": (),
    "no prompt": ("null_rope(1)",),
    "an edit in layer 0": (*SHORT, "logit_diff('e', 'o')", "patch(what='q', layer=0)",
                           "run(top=2, pos=1)", "sweep('q', layer=0)"),
    "readouts": (*SHORT, EDITS[3], "run()", "logit_lens(top=2)", "direct_logit_attribution('e', 'o')"),
    "several sweeps": (*SHORT, "run()", "sweep('q', 'k', by='head', layer=iter([1, 2]))"),
    "set aside and back": (*LONG, *EDITS, *SHORT, *LONG, "run()", "sweep('attn')"),
    "no corrupt prompt": (*LONG, *EDITS, "corrupt = None", "run()"),
    "not a prompt": (*SHORT, EDITS[3], "clean = 5"),
    "a prompt deleted": (*SHORT, EDITS[3], "del clean"),
    "a failed verb": (*SHORT, EDITS[3], "patch(what='q', head=99)", "null_rope(layers=2)", "run()"),
    "a metric too far": (*LONG, "logit_diff('e', 'o', pos=12)", *SHORT, "run()"),
    "a lambda": (*SHORT, "metric(lambda logits: logits[:, -1, 3])", "run()", "sweep('attn', layer=0)"),
    "two models": (*SHORT, "patch(what='q')", "logit_diff('e', 'o')",
                   'clean = models["other-model"].prompt("to be or")'),
    "another model": (
        'clean = models["other-model"].prompt("to be or")', 'corrupt = models["other-model"].prompt("to do or")',
        "patch(what='v', layer=0)", "run()"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("state", mark_later_slow(list(STATES), 5))
def test_every_state_can_be_shown_saved_and_undone(lines, shell, lenses, state, capsys):
    """The script has the same edits, and prints the results of the session's experiment."""
    lines(*STATES[state])
    assert lines("patched()")[1] == lines("guide()")[1] == ""
    assert lines("%save_session state.py") == ("written: state.py\n", "")
    model_state = shell.session.state
    experiment = model_state.experiment
    if model_state.has_prompts:
        expected = [str(experiment.run(*(model_state.run_arguments or ())))]
    else:
        expected = [str(experiment.patched())]
    if experiment.corrupt is not None and experiment.metric.misfit(len(experiment.edited)) is None:
        expected += [
            str(eval(f"experiment.{sweep_call}", {"experiment": experiment}))
            for sweep_call in model_state.sweep_calls
        ]
    if model_state.has_prompts:
        names = {"experiment": experiment, "logit_lens": logit_lens, "dla": direct_logit_attribution}
        short = {"logit_lens": "logit_lens", "direct_logit_attribution": "dla"}
        expected += [
            str(eval(f"{short[verb]}(experiment, {arguments}", names))
            for verb, arguments in model_state.readout_calls.items()
        ]
    edits = str(experiment.patched())
    n_edits = len(experiment.patched())
    for _ in range(n_edits):
        out, error = lines("undo()")
        assert out.startswith("undone: ")
        assert error == ""
    assert lines("undo()") == ("", "error: undo: there is no edit to undo\n")
    scope = {"LOAD": lenses.__getitem__}
    capsys.readouterr()
    exec(compile(Path("state.py").read_text(), "state.py", "exec"), scope)
    assert capsys.readouterr().out.strip() == "\n".join(expected)
    assert str(scope["experiment"].patched()) == edits
    while scope["experiment"].patched():
        scope["experiment"].undo()
