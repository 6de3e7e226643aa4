"""A session's last state as a script of the public API."""

from __future__ import annotations

from collections.abc import Mapping

from phaselens.patching import Experiment, Prompt, loss
from phaselens.patching.edits import call
from phaselens.repl.functions import source_of
from phaselens.repl.session import Session
from phaselens.repl.workspace import Bench
from phaselens.report.words import plain

_HEAD = '''"""A PhaseLens session: loads its model, makes its edits again, and prints what they do."""

import phaselens
from phaselens.patching import {names}

'''
_RESERVED = {
    "phaselens",
    "lens",
    "clean",
    "corrupt",
    "experiment",
    "prompt",
    "logit_diff",
    "Experiment",
    "Prompt",
}


def script(session: Session, loads: Mapping[str, str]) -> str:
    """The script. It can be written in every state of a session; what it cannot hold stands in it as a comment.

    Where the prompts of the moment do not go together it has the last ones that did. An edit that is set aside is made
    on the prompts that it was made on.

    Args:
        session: whose state it is.
        loads: the calls that load the session's models, by label.
    """
    bench = session.bench
    experiment = bench.experiment
    names = {"Experiment"}
    lines = [_load(session, loads), *_prompts(bench, names)]
    if bench.has_prompts and session.mismatch is not None:
        lines.append(f"# These are the last prompts that went together. Later: {plain(session.mismatch)}")
    lines.append("experiment = Experiment(clean, corrupt)")
    metric_lines, metric_held = _metric(experiment, names)
    lines += [*metric_lines, *_edits(experiment, names)]
    if bench.has_prompts:
        lines += _results(session, bench, metric_held=metric_held)
    else:
        lines.append("print(experiment.patched())")
    return _HEAD.format(names=", ".join(sorted(names, key=str.lower))) + "\n".join(lines) + "\n"


def _load(session: Session, loads: Mapping[str, str]) -> str:
    label = session.lens.info.label
    if session.models.get(label) is session.lens and label in loads:
        return f"lens = {loads[label]}"
    return f"lens = phaselens.load({label!r})  # loaded by hand in the session: write here how"


def _prompts(bench: Bench, names: set[str]) -> list[str]:
    experiment = bench.experiment
    if not bench.has_prompts:
        names.add("Prompt")
        ids = experiment.clean.ids
        return [
            "# The session had no prompt yet; this one holds its edits.",
            f"clean = Prompt(lens, '', {ids!r})",
            "corrupt = None",
        ]
    names.add("prompt")
    return [f"clean = {_prompt(experiment.clean)}", f"corrupt = {_prompt(experiment.corrupt)}"]


def _prompt(prompt: Prompt | None) -> str:
    if prompt is None:
        return "None"
    bos = "" if prompt.bos == prompt.lens.bos else f", bos={prompt.bos!r}"
    return f"prompt(lens, {prompt.text!r}{bos})"


def metric_is_held(experiment: Experiment) -> bool:
    """Whether a script can make the experiment's metric again."""
    return _metric(experiment, set())[1]


def _metric(experiment: Experiment, names: set[str]) -> tuple[list[str], bool]:
    """Lines that set the metric, and whether they do."""
    metric = experiment.metric
    if metric is loss:
        return [], True
    if metric.code is not None:
        names.add("logit_diff")
        return [f"experiment.metric = {metric.code}  # {plain(metric.name)}"], True
    source = None if metric.function is None else source_of(metric.function, _RESERVED)
    if source is None:
        name = plain(metric.name)
        return [
            f"# The metric {name} exists in the session only: define it here and set experiment.metric = …"
        ], False
    definition, expression = source
    return [*definition, f"experiment.metric = {expression}"], True


def _edits(experiment: Experiment, names: set[str]) -> list[str]:
    """The calls that make the edits, each on prompts that it fits."""
    lines = []
    present = (experiment.clean, experiment.corrupt)
    current = present
    for edit in experiment.patched():
        needed = present if edit.set_aside is None or edit.made_on is None else edit.made_on
        if needed != current:
            names.add("prompt")
            lines.append(_exchange(needed, present))
            current = needed
        lines.append(f"experiment.{edit.code}")
    if current != present:
        lines.append(_exchange(present, present))
    return lines


def _exchange(prompts: tuple[Prompt, Prompt | None], present: tuple[Prompt, Prompt | None]) -> str:
    if prompts == present:
        return "experiment.prompts(clean, corrupt)"
    clean, corrupt = prompts
    return f"experiment.prompts({_prompt(clean)}, {_prompt(corrupt)})  # the next edits do not fit the last prompts"


def _results(session: Session, bench: Bench, *, metric_held: bool) -> list[str]:
    """Calls that print what the session showed last."""
    experiment = bench.experiment
    top, pos = bench.run or (5, -1)
    n_tokens = len(experiment.edited)
    options = {} if top == 5 else {"top": top}
    if pos != -1 and -n_tokens <= pos < n_tokens:
        options["pos"] = pos
    lines = [f"print(experiment.{call('run', **options)})"]
    if session.watched:
        name, params = session.watched
        lines.append(f"print(experiment.{call('measure', name, **params)})")
    if experiment.corrupt is not None and experiment.metric.misfit(n_tokens) is None:
        comment = "" if metric_held else "# "
        lines += [f"{comment}print(experiment.{swept})" for swept in bench.swept]
    return lines
