"""Activation patching for scripts and notebooks: everything that `phaselens repl` does.

    import phaselens
    from phaselens.patching import Experiment, logit_diff, prompt

    lens = phaselens.load("rope")
    clean, corrupt = prompt(lens, "…"), prompt(lens, "…")        # with the same number of tokens
    experiment = Experiment(clean, corrupt, logit_diff(lens, " he", " she"))
    experiment.patch("blocks.3.hook_resid_post", pos=5)
    print(experiment.run())
    print(experiment.sweep("head"))
    print(Experiments(clean_prompts, corrupt_prompts, metrics).sweep("head"))    # mean and interval over many pairs
    print(logit_lens(experiment), direct_logit_attribution(experiment, " he", " she"))

`phaselens.report.heatmap` draws sweeps on a terminal and as figures.
"""

from phaselens.patching.edits import Stack
from phaselens.patching.experiment import Experiment
from phaselens.patching.metrics import LogitMetric, logit_diff, loss
from phaselens.patching.pairs import Experiments
from phaselens.patching.pairs_results import PairsResult, PairsSweep
from phaselens.patching.plugin_metrics import MetricByLayer, causal_names, metric_names
from phaselens.patching.prompts import Alignment, Prompt, align, prompt
from phaselens.patching.readouts import LogitAttribution, LogitLens, direct_logit_attribution, logit_lens
from phaselens.patching.results import Agreement, PromptResult, Sweep, Token, agreement, stack
from phaselens.patching.targets import KINDS

__all__ = [
    "KINDS",
    "Agreement",
    "Alignment",
    "Experiment",
    "Experiments",
    "LogitAttribution",
    "LogitLens",
    "LogitMetric",
    "MetricByLayer",
    "PairsResult",
    "PairsSweep",
    "Prompt",
    "PromptResult",
    "Stack",
    "Sweep",
    "Token",
    "agreement",
    "align",
    "causal_names",
    "direct_logit_attribution",
    "logit_diff",
    "logit_lens",
    "loss",
    "metric_names",
    "prompt",
    "stack",
]
