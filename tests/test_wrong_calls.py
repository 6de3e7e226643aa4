"""Every public callable refuses, in words that name the argument, what it cannot use, and keywords that it lacks."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import phaselens
from phaselens import attention, data, patching, plugin, runs, spectrum, testing, uncertainty
from phaselens.plugin import Column, Condition, Edit, Losses, Metric, Params, Prompt, TableSpec

PACKAGES = (
    "phaselens", "phaselens.attention", "phaselens.spectrum", "phaselens.uncertainty", "phaselens.patching",
    "phaselens.plugin", "phaselens.runs", "phaselens.data", "phaselens.testing",
)  # fmt: skip

#: What is public to be named in annotations, caught or read, and why nobody calls it.
EXEMPT: dict[str, tuple[Any, ...]] = {
    "an error, which is caught": (
        phaselens.PhaseLensError, phaselens.InputError, phaselens.ModelError, phaselens.RefusedModel,
        phaselens.MetricError,
    ),
    "a type for annotations": (attention.SoftmaxOptions, uncertainty.Interval, plugin.FinishedRun),
    "results of attention": (attention.Summary, attention.Writes),
    "results of spectrum": (
        spectrum.Balance, spectrum.BosNorm, spectrum.Bound, spectrum.Chance, spectrum.MassiveActivations,
        spectrum.Spectrum,
    ),
    "results of uncertainty": (
        uncertainty.Accuracy, uncertainty.ArmComparison, uncertainty.LossComparison, uncertainty.Proportion,
    ),
    "made by the functions and methods of patching": (
        patching.Agreement, patching.Alignment, patching.Measured, patching.Outcome, patching.Prompt, patching.Stack,
        patching.Sweep, patching.Token,
    ),
    "made by phaselens.load, or by the lens": (
        phaselens.HookedTransformer, phaselens.ModelInfo, plugin.Rotation, plugin.Projection,
    ),
    "made by a run, and handed to metrics": (
        plugin.Batch, plugin.LayerView, plugin.Site, plugin.Outcome, plugin.Losses, plugin.Proof,
    ),
    "subclassed; a run makes the instances": (plugin.Metric, plugin.CausalMetric),
    "made by TableSpec.build": (plugin.Table,),
    "made by Params.specs": (plugin.ParamSpec,),
    "made from installed metadata": (plugin.Registered,),
    "pluggy's": (plugin.hookimpl,),
    "results of a run": (
        runs.Failure, runs.MetricResult, runs.ModelFailure, runs.ModelRecord, runs.Run, runs.TextRecord,
    ),
    "made by choose": (runs.Chosen,),
    "made by Encoder.tokens": (data.Tokens,),
    "results of testing": (testing.Finding, testing.Planted),
}  # fmt: skip


class Sound(Metric[Params]):
    """A metric that could be run."""

    name, version = "sound", "1"
    tables = (TableSpec("layers", (Column("layer", int),)),)

    def hooks(self) -> list[str]:
        return []

    def update(self, layer: Any) -> None:
        return

    def compute(self) -> dict[str, Any]:
        return {}


class SoundCausal(plugin.CausalMetric[Params]):
    """A causal metric that could be run."""

    name, version = "sound-causal", "1"

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
    "sinks": torch.zeros(2),
}  # fmt: skip
QKV, QK_LSE = {"q": Q, "k": Q, "v": Q, **SOFTMAX}, {"q": Q, "k": Q, "lse": LSE, **SOFTMAX}
DRAWS = {"confidence": 0.9, "n_resamples": 100, "seed": 0}
PAIRED = {"n_permutations": 10, **DRAWS}


SOUND = functools.cache(lambda: Sound(LENS().info, Params()))


def tokens() -> list[data.Tokens]:
    return [LENS().encoder().tokens(data.Text("a", "to be"), 100)]


#: A right call of each public callable, all of its arguments by name.
CALLS: dict[Any, Callable[[], dict[str, Any]]] = {
    attention.attend: lambda: QKV,
    attention.concentration: lambda: {"received": LSE, "lengths": LENGTHS},
    attention.distance_mass: lambda: {**QK_LSE, "longest": 2, "lengths": LENGTHS},
    attention.explicit: lambda: QKV,
    attention.explicit_pattern: lambda: {"scores": torch.zeros(1, 2, 4, 4), "sinks": torch.zeros(2)},
    attention.explicit_scores: lambda: {
        key: value for key, value in QKV.items() if key not in ("v", "sinks")
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
    attention.sink_mass: lambda: {**QK_LSE, "position": 0},
    attention.sink_score: lambda: {
        "sink": LSE, "lengths": LENGTHS, "include_query0": False, "position": 0, "window": 3,
    },
    attention.summarise: lambda: {
        **QK_LSE, "position": 0, "entropy": True, "received": True, "distances": 2, "refine": True,
        "lengths": LENGTHS, "real": None,
    },
    attention.triangular: lambda: {"w_o": W_O},
    attention.uniform_distance: lambda: LAST_KEYS,
    attention.uniform_entropy: lambda: LAST_KEYS,
    attention.uniform_received: lambda: LAST_KEYS,
    attention.uniform_sink: lambda: {**LAST_KEYS, "include_query0": False, "position": 0},
    attention.uniform_sink_rows: lambda: LAST_KEYS,
    attention.uniform_window: lambda: {**LAST_KEYS, "width": 2, "include_self": False, "exclude_first": True},
    attention.window_mass: lambda: {**QK_LSE, "width": 2, "include_self": False, "exclude_first": True},
    attention.writes: lambda: {"mass": torch.ones(2, 4), "value": CELLS, "w_o": W_O},
    spectrum.balance: lambda: {"attn_out": X, "mlp_out": X},
    spectrum.bos_norm: lambda: {"norms": X[:, 0]},
    spectrum.compression_bound: lambda: {"x": X},
    spectrum.continuity_bound: lambda: {"distance": 0.1, "n": 4},
    spectrum.gaussian_exceedance: lambda: {"n": 4, "median": 1.0, "threshold": 1.0, "ratio": 1.0},
    spectrum.gaussian_max_ratio: lambda: {"n": 4},
    spectrum.massive_activations: lambda: {"x": X, "n": 3, "threshold": 1.0, "ratio": 1.0},
    spectrum.massive_rows: lambda: {"norms": X[:, 0], "factor": 3.0},
    spectrum.median: lambda: {"values": X},
    spectrum.random_rows: lambda: {"norms": [1.0, 2.0], "d": 3},
    spectrum.require_bound: lambda: {
        "found": spectrum.spectrum(X), "bound": spectrum.compression_bound(X), "tolerance": 0.1,
    },
    spectrum.row_norms: lambda: {"x": X},
    spectrum.spectra: lambda: {"x": X, "left_out": torch.tensor([True, False, False, False])},
    spectrum.spectrum: lambda: {"x": X},
    uncertainty.accuracy: lambda: {"correct": 1, "n_answered": 2, "n_asked": 3, "confidence": 0.9},
    uncertainty.compare_arms: lambda: {
        "treated": [1.0, 2.0], "control": [[1.0, 2.0], [2.0, 3.0]], "n_predicted": [1, 2], **PAIRED,
    },
    uncertainty.compare_conditions: lambda: {
        "baseline": [1.0, 2.0], "conditions": [[1.0], [2.0]], "n_predicted": [1, 2], "lengths": [2, 3], **PAIRED,
    },
    uncertainty.compare_losses: lambda: {
        "baseline": [1.0, 2.0], "condition": [1.0, 2.0], "n_predicted": [1, 2], "lengths": [2, 3], **PAIRED,
    },
    uncertainty.mean_interval: lambda: {
        "values": [1.0, 2.0], "present": [True, True], "transform": lambda means: means[..., None], **DRAWS,
    },
    uncertainty.paired_interval: lambda: {
        "first": [1.0, 2.0], "second": [1.0, 2.0], "present": [True, True], **DRAWS,
    },
    uncertainty.perplexity: lambda: {"loss": [1.0, 2.0], "weights": [1, 2]},
    uncertainty.wilson_interval: lambda: {"successes": 1, "n": 2, "confidence": 0.9},
    patching.Experiment: lambda: {"clean": PROMPT(), "corrupt": PROMPT(), "metric": patching.loss},
    patching.LogitMetric: lambda: {
        "name": "a", "compute": lambda logits, tokens: logits, "code": "a", "function": len, "shortest": 1,
    },
    patching.agreement: lambda: {"one": SWEEP(), "other": SWEEP()},
    patching.align: lambda: {"clean": PROMPT(), "corrupt": PROMPT()},
    patching.causal_names: dict,
    patching.logit_diff: lambda: {"lens": LENS(), "a": "a", "b": "b", "pos": -1},
    patching.loss: lambda: {"logits": torch.zeros(1, 3, 9), "tokens": torch.zeros(1, 3, dtype=torch.long)},
    patching.metric_names: dict,
    patching.prompt: lambda: {"lens": LENS(), "text": "to be", "bos": "auto"},
    patching.stack: lambda: {"sweeps": [SWEEP()]},
    plugin.CausalTables: lambda: {"losses": Losses(), "seed": 0, "warn": print},
    plugin.Column: lambda: {"name": "a", "type": float, "unit": "nats", "help": "a"},
    plugin.Condition: lambda: {
        "name": "a", "edits": [Edit("a", 0.0)], "layer": 0, "seed": 0, "control_for": "b", "params": {},
    },
    plugin.Display: lambda: {
        "value": "a", "title": "a", "table": "a", "rows": "layer", "low": "a", "high": "a", "null": "a",
        "percent": False, "strong": 0.1, "strong_means": "a", "also": (("a", "b"),), "summary": (), "digits": 3,
        "by_head": "a", "before": (),
    },
    plugin.Edit: lambda: {"point": "a", "to": 0.0, "positions": [0], "heads": [0]},
    plugin.Encoder: lambda: {"tokenizer": testing.tiny_tokenizer(), "bos": "auto", "bos_token_id": 0},
    plugin.NamedModel: lambda: {"name": "a", "load": dict, "help": "a", "adapters": {}},
    plugin.NamedTexts: lambda: {"name": "a", "read": list, "help": "a"},
    plugin.Params: dict,
    plugin.PerText: dict,
    plugin.Plugins: dict,
    plugin.Prompt: lambda: {"id": "a", "ids": [1, 2], "scored_from": 1},
    plugin.TableSpec: lambda: {"name": "a", "columns": (Column("a"),), "help": "a"},
    plugin.Text: lambda: {"id": "a", "text": "b"},
    plugin.interval_help: lambda: {"over": "texts", "paired": False},
    plugin.param: lambda: {
        "default": "a", "help": "a", "unit": "nats", "minimum": 0.0, "maximum": 1.0, "choices": ("a",),
    },
    plugin.plugins: dict,
    plugin.require_metric: lambda: {"candidate": Sound, "origin": "a"},
    runs.ModelSpec: lambda: {"source": "a", "label": "b", "revision": "c"},
    runs.Observer: dict,
    runs.Options: lambda: {
        "max_tokens": 3, "n_texts": 2, "batch_tokens": 2, "bos": "auto", "device": "auto", "dtype": "auto",
        "positions": {}, "seed": 0,
    },
    runs.applied: lambda: {"lens": LENS(), "condition": [Edit("blocks.0.hook_mlp_out", 0.0)], "batch": None},
    runs.choose: lambda: {"requests": "sinks"},
    runs.gather: lambda: {
        "lens": LENS(), "texts": tokens(), "metric": SOUND(), "batches": [[0]],
    },
    runs.gather_losses: lambda: {
        "lens": LENS(), "texts": tokens(), "metric": SoundCausal(LENS().info, Params()), "batches": [[0]],
    },
    runs.guarded: lambda: {"result": runs.MetricResult(Sound, Params(), "a"), "label": "a", "stage": "update"},
    runs.load_model: lambda: {
        "spec": runs.ModelSpec("rope"), "label": "a", "positions": "auto", "bos": "auto", "device": "auto",
        "dtype": "auto", "check": True,
    },
    runs.run: lambda: {
        "models": [LENS()], "metrics": "sinks", "texts": ["to be"], "max_tokens": 8, "n_texts": 1,
        "batch_tokens": 9, "bos": "auto", "device": "auto", "dtype": "auto", "positions": {}, "seed": 0,
        "observer": runs.Observer(),
    },
    data.pack: lambda: {"lengths": [1], "batch_tokens": 3},
    data.read_texts: lambda: {"source": "bundled", "limit": 1},
    data.texts_from: lambda: {"given": ["a"], "limit": 1},
    testing.check_metric: lambda: {"metric": Sound, "parameters": {}, "allow_matrix": False},
    testing.examine: lambda: {"metric": Sound, "parameters": {}, "allow_matrix": False},
    testing.model_info: lambda: {"n_layers": 2, "n_heads": 4, "positions": "rope", "d_head": 8},
    testing.plant: lambda: {"kind": "pure sink", "positions": "auto", "seed": 0},
    testing.tiny_lens: lambda: {"family": "llama", "label": "a", "positions": "auto", "seed": 0},
    testing.tiny_model: lambda: {
        "family": "llama", "seed": 0, "dtype": torch.float32, "gain": 3.0, "hidden_size": 32,
    },
    testing.tiny_tokenizer: lambda: {"adds_bos": True, "has_bos": True, "adds_eos": False},
    phaselens.load: lambda: {
        "source": testing.tiny_model("llama"), "label": "a", "positions": "auto", "bos": "auto", "device": "auto",
        "dtype": "auto", "revision": None, "tokenizer": None, "check": False, "trust_remote_code": False,
        "allow_pickle": False,
    },
}  # fmt: skip

#: Arguments that take anything: their sort is known only later, from the annotation beside them.
ANYTHING = {(plugin.param, "default")}

#: What messages say in place of an argument's name.
SPOKEN = {
    (patching.logit_diff, "b"): "a token is a text or an id",
    (plugin.require_metric, "candidate"): "no subclass of phaselens.plugin.Metric",
    (runs.choose, "requests"): "metrics",
    (data.texts_from, "given"): "texts",
    (phaselens.load, "source"): "give a name, a folder, a hub id, or a Hugging Face causal LM",
}

#: How Python, numpy and torch complain of what they meet deep inside.
RAW = re.compile(
    r"has no attribute|is not iterable|not subscriptable|unsupported operand|missing \d|not supported between"
    r"|has no len\(\)|object of type|could not convert|cannot be interpreted|no attribute|unhashable|'\w+' object"
    r"|must be (real number|str|Tensor)|argument '|argument must be|expected str, bytes|inhomogeneous"
)


class Unusable:
    """Fits no argument."""

    def __repr__(self) -> str:
        return "<unusable>"


def name_of(function: Any) -> str:
    return getattr(function, "__name__", None) or str(function.name)


def call(function: Any, arguments: dict[str, Any]) -> None:
    made = function(**arguments)
    if hasattr(made, "__enter__"):
        with made:
            pass


def refusal(function: Any, arguments: dict[str, Any]) -> str:
    """What it says when it refuses these arguments."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, arguments)
    return str(caught.value)


def test_each_public_callable_has_a_call_or_a_reason_to_have_none() -> None:
    exempt = [id(each) for members in EXEMPT.values() for each in members]
    assert not set(exempt) & set(map(id, CALLS))
    covered = {*exempt, *map(id, CALLS)}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            member = getattr(package, name)
            assert not callable(member) or id(member) in covered, f"{package.__name__}.{name}"


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_each_argument_refuses_what_it_cannot_use(function: Any) -> None:
    right = CALLS[function]()
    parameters = inspect.signature(function).parameters.values()
    assert {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} <= right.keys()
    for name in right:
        if (function, name) in ANYTHING:
            continue
        message = refusal(function, right | {name: Unusable()})
        assert not RAW.search(message), (name, message)
        assert SPOKEN.get((function, name), name) in message, (name, message)


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_an_unknown_keyword_is_refused(function: Any) -> None:
    message = refusal(function, CALLS[function]() | {"no_such_keyword": 1})
    assert "no_such_keyword" in message or "takes no" in message


NOT_PAIRS: list[Any] = [3, [(0, 1.5)], [(0, -1)], [(0, 8)], [(0, True)], [(0, 1, 2)], ["01"], [3]]
WRONG: list[tuple[Callable[[], Any], str]] = [
    *(
        (lambda pairs=pairs: attention.pair_norms(CELLS, pairs), "expected (each of )?pairs as")
        for pairs in NOT_PAIRS
    ),
    (lambda: attention.pair_norms(CELLS, [(0, 1), (2, 1.5)]), r"dimensions from 0 to 7, received \(2, 1.5\)"),
    (lambda: attention.row_entropy(Q, Q, [1.0], scale=1.0), "expected lse as a tensor, received list"),
    (lambda: attention.attend(Q, Q, Q.numpy(), scale=1.0), "expected v as a tensor, received ndarray"),
    (lambda: attention.attend(Q, Q, Q, scale=1.0, mask=[[True]]), "expected mask as a tensor, received list"),
    (lambda: attention.summarise(Q, Q, LSE, scale=1.0, real=torch.ones(1, 4)), "real .* received torch.float32"),
    (lambda: attention.sink_mass(Q, Q, LSE, None, scale=1.0), "position as a whole number, received None"),
    (lambda: attention.norm_matrix(CELLS), r"states as a tensor \[pos, head, d_head\], received one of shape \(2, 8\)"),
    (lambda: attention.head_norms(torch.zeros(4, 2, 8), torch.zeros(1, 8, 8)), "expected factor of shape"),
    (lambda: attention.gaussian_massive_share([1.5], 5.0), r"n_tokens as a whole number .* received \[1.5\]"),
    (lambda: spectrum.bos_norm([1.0]), r"norms as a tensor \[pos\], received list"),
    (lambda: spectrum.bos_norm(X), r"norms as a tensor \[pos\], received one of shape \(4, 3\)"),
    (lambda: spectrum.compression_bound("3"), r"x as a tensor \[pos, d_model\], received a str"),
    (lambda: spectrum.row_norms(torch.tensor(1.0)), r"x as a tensor \[…, d_model\], received one of shape \(\)"),
    (lambda: spectrum.random_rows(3.0, 4), r"expected norms \[pos\], received shape \(\)"),
    (lambda: spectrum.gaussian_exceedance(1.5, 1.0, 1.0, 1.0), "n as a whole number"),
    (lambda: uncertainty.wilson_interval("3", 5), "successes as a whole number, received '3'"),
    (lambda: uncertainty.wilson_interval(True, 5), "successes as a whole number, received True"),
    (lambda: uncertainty.accuracy(1.5, 2, 3), "correct as a whole number, received 1.5"),
    (lambda: uncertainty.perplexity(["1", "2"], [1, 2]), r"loss as an array of numbers, received \['1', '2'\]"),
    (lambda: uncertainty.compare_arms([1.0, "2"], [[1.0], [2.0]]), "treated as an array of numbers"),
    (lambda: uncertainty.mean_interval([[1.0], [1.0, 2.0]]), "values as an array of numbers"),
    (lambda: uncertainty.mean_interval([1.0, 2.0], present=["no", "no"]), "present as an array of True and False"),
    (lambda: patching.align("a", "b"), "clean is a str, not a prompt"),
    (lambda: patching.stack(3), "sweeps as a list of Sweeps, received 3"),
    (lambda: patching.stack([3]), "each of sweeps as a Sweep from Experiment.sweep or attribution, received 3"),
    (lambda: patching.agreement(3, 4), "one as a Sweep from Experiment.sweep or attribution, received 3"),
    (lambda: patching.prompt("rope", "a"), r"lens as a lens made by phaselens.load\(model\), received 'rope'"),
    (lambda: plugin.interval_help(3), "over as text, received 3"),
    (lambda: Prompt("a", None), "prompt 'a': its ids are None; give a list of token ids"),
    (lambda: runs.ModelSpec(3), "source as text, received 3"),
    (lambda: runs.ModelSpec.parse(3), "a model's name as text, received 3"),
    (lambda: runs.load_model("rope"), "spec as a ModelSpec such as ModelSpec.parse.*, received 'rope'"),
    (lambda: call(runs.applied, {"lens": LENS(), "condition": 3}), "its edits are the int 3; give a list of Edits"),
    (lambda: runs.gather(LENS(), ["a"], SOUND(), [[0]]), "each of texts as a Tokens .* received 'a'"),
    (lambda: runs.gather(LENS(), tokens(), SOUND(), [0]), "each of batches as a list of whole numbers"),
    (lambda: data.pack(["a"], 3), "each of lengths as a whole number of at least 0, received 'a'"),
    (lambda: data.read_texts(3), "source as `bundled` or the name of a .txt or .jsonl file, received 3"),
    (lambda: testing.check_metric(3), "metric as a subclass of phaselens.plugin.Metric, received 3"),
    (lambda: testing.tiny_model("llama", hidden_size="32"), "LlamaConfig: .*'hidden_size' expected int, got str"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), stop_at_layer="1"), "stop_at_layer as a whole number, received '1'"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), stop_at_layer=1.5), "stop_at_layer as a whole number, received 1.5"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), [("hook_embed", 3)]), "a function for the hook point hook_embed"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), ["hook_embed"]), "each of hooks as a pair .name, function."),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), 3), "hooks as a list of pairs .name, function., received 3"),
    (lambda: LENS().attention_replay("1"), "layer as a whole number, received '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_call_says_what_was_expected_and_received(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_cached_answer_does_not_stand_for_another_type() -> None:
    """True and 4.0 are the same keys of a cache as 1 and 4."""
    for function, right, wrong in (
        (attention.uniform_sink, (4, True), (4.0, True)),
        (attention.uniform_sink, (4, True), (4, 1)),
        (attention.uniform_entropy, (1,), (True,)),
        (attention.gaussian_massive_share, (1, 5.0), (True, 5.0)),
        (spectrum.gaussian_max_ratio, (4,), (4.0,)),
    ):
        function(*right)
        with pytest.raises(ValueError, match="expected"):
            function(*wrong)


def test_hooks_may_come_from_a_generator() -> None:
    shapes: list[tuple[int, ...]] = []
    hooks = ((name, lambda tensor, hook: shapes.append(tuple(tensor.shape))) for name in ("hook_embed",))
    LENS().stream(torch.tensor([[0, 5]]), hooks)
    assert shapes == [(1, 2, 32)]
