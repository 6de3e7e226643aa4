"""A session's last state as a script of the public API."""

from __future__ import annotations

from phaselens.errors import InputError
from phaselens.patching import Prompt, loss
from phaselens.repl.session import Session

_HEAD = '''"""A PhaseLens session: loads its model, makes its edits again, and prints what they do."""

import phaselens
from phaselens.patching import {names}

'''


def script(session: Session, loads: dict[str, str]) -> str:
    """The script. `loads` are the calls that load the session's models, by label.

    Raises:
        InputError: where there is no prompt yet, or a metric that only this session knows.
    """
    experiment = session.ready
    if experiment.metric.code is None:
        raise InputError(
            f"save_session: the metric {experiment.metric.name} is a function of this session, which a script "
            "cannot make again; choose logit_diff(…) or metric('loss')"
        )
    names = {"Experiment", "prompt"}
    lines = [
        f"lens = {loads[experiment.lens.info.label]}",
        f"clean = {_prompt(experiment.clean)}",
        f"corrupt = {'None' if experiment.corrupt is None else _prompt(experiment.corrupt)}",
        "experiment = Experiment(clean, corrupt)",
    ]
    if experiment.metric is not loss:
        names.add("logit_diff")
        lines.append(f"experiment.metric = {experiment.metric.code}  # {experiment.metric.name}")
    lines += [f"experiment.{edit.code}" for edit in experiment.patched()]
    lines.append("print(experiment.run())")
    if session.watched:
        name, params = session.watched
        given = "".join(f", {key}={value!r}" for key, value in params.items())
        lines.append(f"print(experiment.measure({name!r}{given}))")
    if session.swept and experiment.corrupt is not None:
        lines.append(f"print(experiment.{session.swept})")
    return _HEAD.format(names=", ".join(sorted(names, key=str.lower))) + "\n".join(lines) + "\n"


def _prompt(prompt: Prompt) -> str:
    bos = "" if prompt.bos == prompt.lens.bos else f", bos={prompt.bos!r}"
    return f"prompt(lens, {prompt.text!r}{bos})"
