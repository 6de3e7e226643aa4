"""Valid calls of the public callables, and the reasons why others have none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import phaselens
from phaselens import attention, data, patching, plugin, runs, spectrum, testing, uncertainty
from phaselens.plugin import Column, Condition, Display, Edit, FigureSet, Losses, Metric, Params, TableSpec

#: Public names that users annotate with, catch or read, by the reason why a user does not call them.
EXEMPT: dict[str, tuple[Any, ...]] = {
    "an error to catch": (
        phaselens.PhaseLensError, phaselens.InputError, phaselens.ModelError, phaselens.RefusedModel,
        phaselens.MetricError, plugin.DamagedState,
    ),
    "a type for annotations": (
        attention.SoftmaxOptions, uncertainty.Interval, plugin.FinishedRun, plugin.ConditionKey, plugin.CellValue,
    ),
    "results of attention": (
        attention.KeyGeometry, attention.LargestProduct, attention.Remainder, attention.Summary, attention.Writes,
    ),
    "results of spectrum": (
        spectrum.Balance, spectrum.BosNormRows, spectrum.Bound, spectrum.MassiveActivationRows,
        spectrum.NullSpectrum, spectrum.Spectrum,
    ),
    "results of uncertainty": (
        uncertainty.ArmComparison, uncertainty.LossComparison, uncertainty.PairedComparison, uncertainty.Proportion,
        uncertainty.RankCorrelation,
    ),
    "made by compare": (runs.Comparison,),
    "made by the functions and methods of patching": (
        patching.Agreement, patching.Alignment, patching.MetricByLayer, patching.PromptResult, patching.Prompt,
        patching.Stack, patching.Sweep, patching.Token, patching.LogitAttribution, patching.LogitLens,
        patching.PairsResult, patching.PairsSweep,
    ),
    "made by phaselens.load or the lens": (
        phaselens.HookedTransformer, phaselens.ModelInfo, plugin.RotatedPairs, plugin.Projection,
    ),
    "made by a run and passed to metrics": (
        plugin.Batch, plugin.LayerView, plugin.Site, plugin.TextOutcome, plugin.Losses, plugin.EditEffect,
    ),
    "subclassed; a run makes the instances": (plugin.Metric, plugin.CausalMetric),
    "made by TableSpec.build": (plugin.Table,),
    "made by Params.specs": (plugin.ParamSpec,),
    "made from installed metadata": (plugin.RegisteredPlugin,),
    "made by read_corpus": (data.Corpus,),
    "from pluggy": (plugin.hookimpl,),
    "a dict": (plugin.NestedState,),
    "results of a run": (
        runs.Failure, runs.FailedShard, runs.MetricResult, runs.ModelFailure, runs.ModelRecord, runs.Run,
        runs.RunSummary, runs.ModelPlan, runs.PlannedPass, runs.RunPlan,
        runs.TextRecord,
    ),
    "made by select_metrics": (runs.SelectedMetric,),
    "made by read_study": (runs.Study,),
    "results of a study": (runs.StudyResult,),
    "made by Encoder.tokenize": (data.TokenizedText,),
    "results of testing": (testing.Finding, testing.Planted),
}  # fmt: skip


class ValidMetric(Metric[Params]):
    """A valid metric."""

    name, version = "valid", "1"
    tables = (TableSpec("layers", (Column("layer", int),)),)

    def hooks(self) -> list[str]:
        return []

    def update(self, layer: Any) -> None:
        return

    def compute(self) -> dict[str, Any]:
        return {}


class ValidCausalMetric(plugin.CausalMetric[Params]):
    """A valid causal metric."""

    name, version = "valid-causal", "1"

    def conditions(self) -> list[Condition]:
        return [Condition("zero", [Edit("blocks.0.hook_mlp_out", 0.0)])]


LENS = functools.cache(lambda: testing.tiny_lens("llama"))
PROMPT = functools.cache(lambda: patching.prompt(LENS(), "to be"))
SWEEP = functools.cache(
    lambda: patching.Experiment(PROMPT(), patching.prompt(LENS(), "to do"), patching.loss).sweep("resid")
)
Q, LSE, LENGTHS = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4), torch.tensor([4])
CELLS, X, W_O = torch.ones(2, 8), torch.arange(12.0).view(4, 3), torch.ones(2, 8, 5)
LAST_KEYS = {"n_tokens": 4, "window": 2}
SOFTMAX = {
    "scale": 1.0, "mask": torch.ones(1, 1, 4, 4, dtype=torch.bool), "window": 3, "softcap": 5.0,
    "sink_logits": torch.zeros(2), "bias": torch.zeros(1, 1, 1, 4),
}  # fmt: skip
QKV, QK_LSE = {"q": Q, "k": Q, "v": Q, **SOFTMAX}, {"q": Q, "k": Q, "lse": LSE, **SOFTMAX}
DRAWS = {"confidence": 0.9, "n_resamples": 100, "seed": 0}
PAIRED = {"n_permutations": 10, **DRAWS}
FINISHED_RUN = functools.cache(
    lambda: runs.run(
        [testing.tiny_lens("llama", label=label) for label in ("a", "b")], metrics="sinks", texts=["to be"]
    )
)
METRIC = functools.cache(lambda: ValidMetric(LENS().info, Params()))


def tokens() -> list[data.TokenizedText]:
    return [LENS().encoder().tokenize(data.Text("a", "to be"), 100)]


#: A valid call of each public callable, with every argument by keyword.
CALLS: dict[Any, Callable[[], dict[str, Any]]] = {
    attention.all_finite: lambda: {"states": Q},
    attention.attend: lambda: QKV,
    attention.attend_without: lambda: {**QKV, "keys": torch.tensor([[0]])},
    attention.key_geometry: lambda: {"q": Q[0], "k": Q[0], "scale": 1.0, "position": 0, "window": 3},
    attention.key_scores: lambda: {
        **{key: value for key, value in QKV.items() if key != "v"}, "keys": torch.tensor([[0]]),
    },
    attention.largest_product: lambda: {"q": Q[0], "k": Q[0], "window": 3, "by_query": torch.ones(2, 4)},
    attention.rows_changed: lambda: {
        "rest": attention.Remainder(Q, LSE), "scores": torch.zeros(1, 2, 4, 1),
        "edited": torch.zeros(1, 2, 4, 1), "dtype": torch.float32,
    },
    attention.reweighted: lambda: {
        "own": Q, "rest": attention.Remainder(Q, LSE), "v": Q, "keys": torch.tensor([[0]]),
        "scores": torch.zeros(1, 2, 4, 1), "edited": torch.zeros(1, 2, 4, 1),
    },
    attention.concentration: lambda: {"received": LSE, "lengths": LENGTHS},
    attention.distance_mass: lambda: {**QK_LSE, "longest": 2, "lengths": LENGTHS},
    attention.explicit: lambda: QKV,
    attention.explicit_pattern: lambda: {"scores": torch.zeros(1, 2, 4, 4), "sink_logits": torch.zeros(2)},
    attention.explicit_scores: lambda: {
        key: value for key, value in QKV.items() if key not in ("v", "sink_logits")
    },
    attention.gaussian_massive_share: lambda: {"n_tokens": 3, "multiple": 5.0},
    attention.head_norms: lambda: {"z": torch.zeros(4, 2, 8), "factor": torch.zeros(2, 8, 8)},
    attention.massive_cells: lambda: {"norms": CELLS, "multiple": 5.0, "over": "global"},
    attention.n_seeing: lambda: LAST_KEYS,
    attention.norm_matrix: lambda: {"states": torch.zeros(4, 2, 8)},
    attention.normalised_entropy: lambda: {"entropy": LSE, "window": 2},
    attention.pair_norms: lambda: {"norms": CELLS, "pairs": [(0, 1)]},
    attention.query_mean: lambda: {"rows": LSE, "lengths": LENGTHS, "first": 0, "last": 2},
    attention.received_mass: lambda: {**QK_LSE, "lengths": LENGTHS},
    attention.refine_lse: lambda: QK_LSE,
    attention.row_entropy: lambda: QK_LSE,
    attention.scaled_writes: lambda: {
        "mass": torch.ones(2, 4), "values": torch.ones(4, 2, 8), "w_o": W_O, "factor": torch.ones(2, 5, 8),
    },
    attention.segment_mass: lambda: {
        **QK_LSE, "segments": torch.zeros(1, 4, dtype=torch.long), "n_segments": 2,
    },
    attention.sink_mass: lambda: {**QK_LSE, "position": 0},
    attention.sink_score: lambda: {
        "sink": LSE, "lengths": LENGTHS, "include_query0": False, "position": 0, "window": 3,
    },
    attention.summarise: lambda: {
        **QK_LSE, "position": 0, "entropy": True, "received": True, "distances": 2, "itself": True, "refine": True,
        "segments": torch.zeros(1, 4, dtype=torch.long), "n_segments": 2, "top": True, "largest": True,
        "lengths": LENGTHS, "real": None,
    },
    attention.top_keys: lambda: QK_LSE,
    attention.triangular: lambda: {"w_o": W_O},
    attention.uniform_distance: lambda: LAST_KEYS,
    attention.uniform_entropy: lambda: LAST_KEYS,
    attention.uniform_learned_sink: lambda: {"n_tokens": 4, "include_query0": False, "window": 2},
    attention.uniform_received: lambda: LAST_KEYS,
    attention.uniform_sink: lambda: {**LAST_KEYS, "include_query0": False, "position": 0},
    attention.uniform_sink_rows: lambda: LAST_KEYS,
    attention.uniform_window: lambda: {**LAST_KEYS, "width": 2, "include_self": False, "exclude_first": True},
    attention.window_mass: lambda: {**QK_LSE, "width": 2, "include_self": False, "exclude_first": True},
    attention.writes: lambda: {"mass": torch.ones(2, 4), "value": CELLS, "w_o": W_O},
    spectrum.adjacency: lambda: {"x": X, "partners": torch.tensor([2, 3, 0])},
    spectrum.balance: lambda: {"attn_out": X, "mlp_out": X},
    spectrum.bos_norm: lambda: {"norms": X[:, 0]},
    spectrum.compression_bound: lambda: {"x": X},
    spectrum.continuity_bound: lambda: {"distance": 0.1, "n": 4},
    spectrum.gaussian_exceedance: lambda: {"n": 4, "median": 1.0, "threshold": 1.0, "ratio": 1.0},
    spectrum.gaussian_max_ratio: lambda: {"n": 4},
    spectrum.massive_activations: lambda: {"x": X, "n": 3, "threshold": 1.0, "ratio": 1.0},
    spectrum.massive_coordinates: lambda: {"x": X, "threshold": 1.0, "ratio": 1.0},
    spectrum.massive_rows: lambda: {"norms": X[:, 0], "factor": 3.0},
    spectrum.median: lambda: {"values": X},
    spectrum.prefix_spread: lambda: {"x": X},
    spectrum.random_rows: lambda: {"norms": [1.0, 2.0], "d": 3},
    spectrum.random_spread: lambda: {"n": 4},
    spectrum.rank_collapse: lambda: {"x": X},
    spectrum.relative_change: lambda: {"x": X, "changed": X + 1},
    spectrum.require_bound: lambda: {
        "spectrum": spectrum.spectrum(X), "bound": spectrum.compression_bound(X), "tolerance": 0.1,
    },
    spectrum.row_norms: lambda: {"x": X},
    spectrum.spectra: lambda: {"x": X, "left_out": torch.tensor([True, False, False, False])},
    spectrum.spectrum: lambda: {"x": X},
    spectrum.row_cosines: lambda: {"x": X, "row": X[0]},
    uncertainty.compare_arms: lambda: {
        "treated": [1.0, 2.0], "control": [[1.0, 2.0], [2.0, 3.0]], "n_predicted": [1, 2], **PAIRED,
    },
    uncertainty.rank_correlation: lambda: {
        "first": [1.0, 2.0], "second": [2.0, 1.0], "n_permutations": 10, "seed": 0,
    },
    uncertainty.spearman: lambda: {"first": [1.0, 2.0], "second": [2.0, 1.0]},
    uncertainty.compare_paired: lambda: {"first": [[1.0], [2.0]], "second": [[2.0], [4.0]], **PAIRED},
    uncertainty.compare_conditions: lambda: {
        "baseline": [1.0, 2.0], "conditions": [[1.0], [2.0]], "n_predicted": [1, 2], "lengths": [2, 3], **PAIRED,
    },
    uncertainty.mean_interval: lambda: {
        "values": [1.0, 2.0], "present": [True, True], "transform": lambda means: means[..., None], **DRAWS,
    },
    uncertainty.paired_interval: lambda: {
        "first": [1.0, 2.0], "second": [1.0, 2.0], "present": [True, True], **DRAWS,
    },
    uncertainty.wilson_interval: lambda: {"successes": 1, "n": 2, "confidence": 0.9},
    plugin.interval_columns: lambda: {"unit": "share", "low": "low", "high": "high"},
    plugin.mean_intervals: lambda: {"metric": METRIC(), "values": [], "where": None, "n_resamples": 9, "explain": True},
    plugin.with_adjusted_p: lambda: {"rows": [("a", 0.5)], "index": 1},
    uncertainty.adjust_p_values: lambda: {"p_values": [0.5, None], "method": "holm"},
    patching.Experiment: lambda: {"clean": PROMPT(), "corrupt": PROMPT(), "metric": patching.loss},
    patching.Experiments: lambda: {"clean": [PROMPT()], "corrupt": [PROMPT()], "metric": patching.loss},
    patching.LogitMetric: lambda: {
        "name": "a", "compute": lambda logits, tokens: logits, "code": "a", "function": len, "shortest": 1,
    },
    patching.agreement: lambda: {"sweep_a": SWEEP(), "sweep_b": SWEEP()},
    patching.align: lambda: {"clean": PROMPT(), "corrupt": PROMPT()},
    patching.causal_names: dict,
    patching.direct_logit_attribution: lambda: {"source": PROMPT(), "a": "a", "b": "b", "pos": -1},
    patching.logit_lens: lambda: {"source": PROMPT(), "pos": -1, "top": 3},
    patching.logit_diff: lambda: {"lens": LENS(), "a": "a", "b": "b", "pos": -1},
    patching.loss: lambda: {"logits": torch.zeros(1, 3, 9), "tokens": torch.zeros(1, 3, dtype=torch.long)},
    patching.metric_names: dict,
    patching.prompt: lambda: {"lens": LENS(), "text": "to be", "bos": "auto"},
    patching.stack: lambda: {"sweeps": [SWEEP()]},
    plugin.CausalTables: lambda: {"losses": Losses(), "seed": 0, "warn": print},
    plugin.Column: lambda: {"name": "a", "type": float, "unit": "nats", "help": "a"},
    plugin.Condition: lambda: {
        "name": "a", "edits": [Edit("a", 0.0)], "layer": 0, "seed": 0, "control_for": "b", "params": {}, "head": 0,
    },
    plugin.Display: lambda: {
        "value": "a", "title": "a", "table": "a", "rows": "layer", "low": "a", "high": "a", "null": "a",
        "percent": False, "strong": 0.1, "strong_means": "a", "also": (("a", "b"),), "summary": (), "digits": 3,
        "by_head": "a", "before": (), "row_title": "a",
    },
    plugin.Edit: lambda: {
        "point": "a", "to": 0.0, "positions": [0], "heads": [0], "keys": [0], "entries": [0],
    },
    plugin.Encoder: lambda: {"tokenizer": testing.tiny_tokenizer(), "bos": "auto", "bos_token_id": 0},
    plugin.FigurePanel: lambda: {
        "figure_set": FigureSet("a", ("b",)), "name": "b", "display": Display("a", "a"), "summary_only": True,
    },
    plugin.FigureSet: lambda: {"name": "a", "panels": ("b",)},
    plugin.MetricWarning: lambda: {"message": "a", "code": "b"},
    plugin.NamedModel: lambda: {"name": "a", "load": dict, "help": "a", "adapters": {}},
    plugin.NamedTexts: lambda: {"name": "a", "read": list, "help": "a"},
    plugin.Params: dict,
    plugin.PerText: dict,
    plugin.read_state: lambda: {"path": "no-such-file"},
    plugin.write_state: lambda: {"path": "no-such-folder/x", "tree": {}, "metadata": None, "replace": False},
    plugin.Plugins: dict,
    plugin.TaskPrompt: lambda: {"id": "a", "ids": [1, 2], "scored_from": 1},
    plugin.TokenSequence: lambda: {
        "id": "a", "ids": [1], "group": "b", "rotation_mode": "nope", "segments": [0],
    },
    plugin.TableSpec: lambda: {"name": "a", "columns": (Column("a"),), "help": "a"},
    plugin.Text: lambda: {"id": "a", "text": "b", "label": "c"},
    plugin.in_layer: lambda: {"layer": 0, "point": "hook_mlp_out"},
    plugin.interval_help: lambda: {"over": "texts", "paired": False},
    plugin.param: lambda: {
        "default": "a", "help": "a", "unit": "nats", "minimum": 0.0, "maximum": 1.0, "choices": ("a",),
    },
    plugin.plugins: dict,
    plugin.kind_of: lambda: {"metric": ValidMetric},
    plugin.ReportSection: lambda: {"title": "a", "paragraphs": ("b",), "columns": ("c",), "rows": ((1.0,),)},
    plugin.require_metric: lambda: {"candidate": ValidMetric, "origin": "a"},
    runs.ModelSpec: lambda: {"source": "a", "label": "b", "revision": "c"},
    runs.Observer: dict,
    runs.RunOptions: lambda: {
        "max_tokens": 3, "n_texts": 2, "window": 3, "stride": 2, "batch_tokens": 2, "shard_tokens": 9, "bos": "auto",
        "device": "auto",
        "dtype": "auto", "positions": {}, "seed": 0,
        "device_map": None, "adapter_scale": 0.5, "softmax_scale": {}, "rope_scaling": {},
        "threads": 1,
    },
    runs.applied: lambda: {"lens": LENS(), "condition": [Edit("blocks.0.hook_mlp_out", 0.0)], "batch": None},
    runs.open_run: lambda: {"path": "no-such-folder"},
    runs.plan: lambda: {
        "models": [LENS()], "metrics": "sinks", "texts": ["to be"], "text_fields": None,
        "options": runs.RunOptions(), "automatic_batches": False, "observer": runs.Observer(),
    },
    runs.find_runs: lambda: {"paths": ["no-such-folder"]},
    runs.group_by_label: lambda: {"run": FINISHED_RUN()},
    runs.select_metrics: lambda: {"requests": "sinks"},
    runs.shipped_studies: dict,
    runs.read_study: lambda: {"study": "rope-vs-drope"},
    runs.require_measurable: lambda: {"study": runs.read_study("massive-activations")},
    runs.run_study: lambda: {
        "study": runs.read_study("massive-activations"), "models": ["rope"], "out": None, "device": "auto",
        "observer": None,
    },
    runs.feed_metric: lambda: {
        "lens": LENS(), "tokenized_texts": tokens(), "metric": METRIC(), "batches": [[0]],
    },
    runs.feed_losses: lambda: {
        "lens": LENS(), "tokenized_texts": tokens(), "metric": ValidCausalMetric(LENS().info, Params()),
        "batches": [[0]],
    },
    runs.guarded: lambda: {"result": runs.MetricResult(ValidMetric, Params(), "a"), "label": "a", "stage": "update"},
    runs.load_model: lambda: {
        "spec": runs.ModelSpec("rope"), "label": "a", "positions": "auto", "bos": "auto", "device": "auto",
        "dtype": "auto", "check": True, "device_map": None,
        "adapter_scale": None, "softmax_scale": None, "rope_scaling": None,
    },
    runs.run: lambda: {
        "models": [LENS()], "metrics": "sinks", "texts": ["to be"], "text_fields": None, "max_tokens": 8, "n_texts": 1,
        "window": 4, "stride": None,
        "batch_tokens": 9, "shard_tokens": 9, "bos": "auto", "device": "auto", "dtype": "auto", "positions": {},
        "seed": 0, "observer": runs.Observer(), "out": None, "fresh": False, "command": ["phaselens", "run"],
        "device_map": None, "adapter_scale": None, "softmax_scale": None, "rope_scaling": None,
        "threads": None, "workers": None, "engine": "processes", "address": None, "shards": None, "phase": None,
    },
    runs.merge: lambda: {"path": "no-such-folder", "allow_missing": False},
    runs.compare: lambda: {
        "first": FINISHED_RUN(), "second": FINISHED_RUN(), "models": ("a", "b"), "allow": (), "seed": 0, "by": None,
    },
    phaselens.compare: lambda: CALLS[runs.compare](),
    data.pack: lambda: {"lengths": [1], "batch_tokens": 3},
    data.read_texts: lambda: {"source": "bundled", "limit": 1, "fields": data.TextFields()},
    data.read_corpus: lambda: {"source": "bundled", "limit": 1, "fields": data.TextFields()},
    data.corpus_from: lambda: {"source": ["a"], "limit": 1, "fields": data.TextFields()},
    data.Windows: lambda: {"size": 8, "stride": 4},
    data.TextFields: lambda: {"text": "text", "id": "id", "label": "kind", "paragraphs": False},
    data.texts_from: lambda: {"source": ["a"], "limit": 1},
    testing.check_metric: lambda: {"metric": ValidMetric, "parameters": {}, "allow_matrix": False},
    testing.examine: lambda: {"metric": ValidMetric, "parameters": {}, "allow_matrix": False},
    testing.model_info: lambda: {"n_layers": 2, "n_heads": 4, "positions": "rope", "d_head": 8},
    testing.plant: lambda: {"kind": "pure sink", "positions": "auto", "seed": 0},
    testing.tiny_lens: lambda: {"family": "llama", "label": "a", "positions": "auto", "seed": 0},
    testing.tiny_model: lambda: {
        "family": "llama", "seed": 0, "dtype": torch.float32, "gain": 3.0, "hidden_size": 32,
    },
    testing.tiny_tokenizer: lambda: {"adds_bos": True, "has_bos": True, "adds_eos": False},
    phaselens.run: lambda: CALLS[runs.run](),
    phaselens.merge: lambda: CALLS[runs.merge](),
    phaselens.open_run: lambda: CALLS[runs.open_run](),
    phaselens.load: lambda: {
        "source": testing.tiny_model("llama"), "label": "a", "positions": "auto", "bos": "auto", "device": "auto",
        "dtype": "auto", "revision": None, "tokenizer": None, "check": False, "trust_remote_code": False,
        "allow_pickle": False, "device_map": None, "adapter_scale": None, "softmax_scale": None, "rope_scaling": None,
    },
}  # fmt: skip


def call(function: Any, arguments: dict[str, Any]) -> None:
    result = function(**arguments)
    if hasattr(result, "__enter__"):
        with result:
            pass
