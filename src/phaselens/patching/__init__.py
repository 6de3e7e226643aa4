"""Activation patching for scripts and notebooks: everything that `phaselens repl` does.

    import phaselens
    from phaselens.patching import Experiment, logit_diff, prompt

    lens = phaselens.load("rope")
    clean, corrupt = prompt(lens, "…"), prompt(lens, "…")        # with the same number of tokens
    experiment = Experiment(clean, corrupt, logit_diff(lens, " he", " she"))
    experiment.patch("blocks.3.hook_resid_post", pos=5)
    print(experiment.run())
    print(experiment.sweep("head"))

`phaselens.report.heatmap` draws sweeps on a terminal and as figures.
"""

from phaselens.patching.edits import Stack
from phaselens.patching.experiment import Experiment
from phaselens.patching.metrics import LogitMetric, logit_diff, loss
from phaselens.patching.plugin_metrics import MetricByLayer, causal_names, metric_names
from phaselens.patching.prompts import Alignment, Prompt, align, prompt
from phaselens.patching.results import Agreement, PromptResult, Sweep, Token, agreement, stack
from phaselens.patching.targets import KINDS

__all__ = [
    "KINDS",
    "Agreement",
    "Alignment",
    "Experiment",
    "LogitMetric",
    "MetricByLayer",
    "Prompt",
    "PromptResult",
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
