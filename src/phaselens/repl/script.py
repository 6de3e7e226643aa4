"""The last state of a session as a script that uses the public API."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap

from phaselens.patching import Experiment, Prompt, loss
from phaselens.patching.wording import call_source
from phaselens.repl.functions import source_of
from phaselens.repl.session import Session
from phaselens.repl.workspace import ModelState
from phaselens.report.strings import printable

_HEAD = '''"""A PhaseLens session: loads its model, recreates its edits, and prints what they do."""

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
    "logit_lens",
    "direct_logit_attribution",
    "Experiment",
    "Prompt",
}


def script(session: Session, loads: Mapping[str, str]) -> str:
    """Return the script that recreates a session's state; it has a comment for whatever it cannot recreate.

    If the current prompts do not match, the script has the last prompts that did. An edit that is set aside is made on
    the prompts on which the session made it.

    Args:
        session: the session, in any state.
        loads: the calls that load the session's models, by label.
    """
    state = session.state
    experiment = state.experiment
    imports = {"Experiment"}
    lines = [_load_line(session, loads), *_prompt_lines(state, imports)]
    if state.has_prompts and session.mismatch is not None:
        lines.append(f"# These are the last prompts that matched. Later: {printable(session.mismatch)}")
    lines.append("experiment = Experiment(clean, corrupt)")
    metric_lines, has_metric = _metric_lines(experiment, imports)
    lines += [*metric_lines, *_edit_lines(experiment, imports)]
    if state.has_prompts:
        lines += _result_lines(session, state, has_metric=has_metric)
        for verb, arguments in state.readout_calls.items():
            imports.add(verb)
            lines.append(f"print({verb}(experiment, {arguments})")
    else:
        lines.append("print(experiment.patched())")
    return _HEAD.format(names=", ".join(sorted(imports, key=str.lower))) + "\n".join(lines) + "\n"


def _load_line(session: Session, loads: Mapping[str, str]) -> str:
    label = session.lens.info.label
    if label in loads and label in session.models and unwrap(session.models[label]) is session.lens:
        return f"lens = {loads[label]}"
    return f"lens = phaselens.load({label!r})  # loaded by hand in the session: write the call here"


def _prompt_lines(state: ModelState, imports: set[str]) -> list[str]:
    experiment = state.experiment
    if not state.has_prompts:
        imports.add("Prompt")
        ids = experiment.clean.ids
        return [
            "# The session had no prompt yet; this is a placeholder for its edits.",
            f"clean = Prompt(lens, '', {ids!r})",
            "corrupt = None",
        ]
    imports.add("prompt")
    return [f"clean = {_prompt_source(experiment.clean)}", f"corrupt = {_prompt_source(experiment.corrupt)}"]


def _prompt_source(prompt: Prompt | None) -> str:
    if prompt is None:
        return "None"
    bos = "" if prompt.bos == prompt.lens.bos else f", bos={prompt.bos!r}"
    return f"prompt(lens, {prompt.text!r}{bos})"


def can_recreate_metric(experiment: Experiment) -> bool:
    """Return whether a script can recreate the experiment's metric."""
    return _metric_lines(experiment, set())[1]


def _metric_lines(experiment: Experiment, imports: set[str]) -> tuple[list[str], bool]:
    """Return lines that set the metric, or a comment if no script can, and whether they set it."""
    metric = experiment.metric
    if metric is loss:
        return [], True
    if metric.code is not None:
        imports.add("logit_diff")
        return [f"experiment.metric = {metric.code}  # {printable(metric.name)}"], True
    source = None if metric.function is None else source_of(metric.function, _RESERVED)
    if source is None:
        name = printable(metric.name)
        return [
            f"# The metric {name} exists in the session only: define it here and set experiment.metric = …"
        ], False
    definition, expression = source
    return [*definition, f"experiment.metric = {expression}"], True


def _edit_lines(experiment: Experiment, imports: set[str]) -> list[str]:
    """Return the calls that make the edits, each on prompts that it fits."""
    lines = []
    final_prompts = (experiment.clean, experiment.corrupt)
    current = final_prompts
    for edit in experiment.patched():
        required = final_prompts if edit.set_aside is None or edit.made_on is None else edit.made_on
        if required != current:
            imports.add("prompt")
            lines.append(_replacement_line(required, final_prompts))
            current = required
        lines.append(f"experiment.{edit.code}")
    if current != final_prompts:
        lines.append(_replacement_line(final_prompts, final_prompts))
    return lines


def _replacement_line(
    prompts: tuple[Prompt, Prompt | None], final_prompts: tuple[Prompt, Prompt | None]
) -> str:
    if prompts == final_prompts:
        return "experiment.prompts(clean, corrupt)"
    clean, corrupt = prompts
    sources = f"{_prompt_source(clean)}, {_prompt_source(corrupt)}"
    return f"experiment.prompts({sources})  # the next edits do not fit the last prompts"


def _result_lines(session: Session, state: ModelState, *, has_metric: bool) -> list[str]:
    """Return the calls that print the last results of the session."""
    experiment = state.experiment
    top, pos = state.run_arguments or (5, -1)
    n_tokens = len(experiment.edited)
    options = {} if top == 5 else {"top": top}
    if pos != -1 and -n_tokens <= pos < n_tokens:
        options["pos"] = pos
    lines = [f"print(experiment.{call_source('run', **options)})"]
    if session.run_metric:
        name, params = session.run_metric
        lines.append(f"print(experiment.{call_source('measure', name, **params)})")
    if experiment.corrupt is not None and experiment.metric.misfit(n_tokens) is None:
        comment = "" if has_metric else "# "
        lines += [f"{comment}print(experiment.{sweep_call})" for sweep_call in state.sweep_calls]
    return lines
