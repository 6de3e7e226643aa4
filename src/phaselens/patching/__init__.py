"""Activation patching by hand: what `phaselens repl` does, for scripts and notebooks.

    import phaselens
    from phaselens.patching import Experiment, logit_diff, prompt

    lens = phaselens.load("rope")
    clean, corrupt = prompt(lens, "…"), prompt(lens, "…")        # of as many tokens
    experiment = Experiment(clean, corrupt, logit_diff(lens, " he", " she"))
    experiment.patch("blocks.3.hook_resid_post", pos=5)
    print(experiment.run())
    print(experiment.sweep("head"))

`phaselens.report.heatmap` draws sweeps, on a terminal and as figures.
"""

from phaselens.patching.edits import Stack
from phaselens.patching.experiment import Experiment
from phaselens.patching.metrics import LogitMetric, logit_diff, loss
from phaselens.patching.named import Measured, causal_names, metric_names
from phaselens.patching.points import KINDS
from phaselens.patching.prompts import Alignment, Prompt, align, prompt
from phaselens.patching.results import Agreement, Outcome, Sweep, Token, agreement, stack

__all__ = [
    "KINDS",
    "Agreement",
    "Alignment",
    "Experiment",
    "LogitMetric",
    "Measured",
    "Outcome",
    "Prompt",
    "Stack",
    "Sweep",
    "Token",
    "agreement",
    "align",
    "causal_names",
    "logit_diff",
    "loss",
    "metric_names",
    "prompt",
    "stack",
]
