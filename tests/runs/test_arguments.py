"""Every argument counts: what would be ignored, or cannot be used, is refused in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens import attention, spectrum, uncertainty
from phaselens.data import Encoder, Text, pack, texts_from
from phaselens.errors import InputError
from phaselens.runs import ModelSpec, Options
from phaselens.testing import tiny_model
from phaselens_plugins.sinks import Sinks
from tests.toys import letters, save_checkpoint, toy_lens

TEXTS = [letters(5), letters(9)]


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


def rates(run: Any) -> list[Any]:
    return [record["sink_rate"] for record in run.rows("sinks", "layers").records()]


@pytest.mark.parametrize("metric", ["sinks", Sinks])
def test_metrics_may_be_a_mapping_to_their_parameters(lens: Any, metric: Any) -> None:
    low = phaselens.run(lens, metrics=[("sinks", {"threshold": 0.1})], texts=TEXTS)
    run = phaselens.run(lens, metrics={metric: {"threshold": 0.1}, "bos-norm": {}}, texts=TEXTS)
    assert list(run.metrics) == ["sinks", "bos-norm"]
    assert run.metrics["sinks"].params.as_dict()["threshold"] == 0.1
    assert rates(run) == rates(low) != rates(phaselens.run(lens, metrics="sinks", texts=TEXTS))


def test_a_tuple_of_names_is_no_pair(lens: Any) -> None:
    assert list(phaselens.run(lens, metrics=("sinks", "bos-norm"), texts=TEXTS).metrics) == [
        "sinks",
        "bos-norm",
    ]


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"metrics": [("sinks", None)]}, "metric 'sinks': its parameters are None; give a dict"),
    ({"metrics": {"sinks": None}}, "metric 'sinks': its parameters are None; give a dict"),
    ({"metrics": {"sinks": 0.3}}, "its parameters are the float 0.3"),
    ({"metrics": {"sinks": {"treshold": 0.3}}}, "sinks: no parameter 'treshold'; did you mean threshold?"),
    ({"metrics": {"sinks": {"threshold": "high"}}}, "threshold is 'high'; it takes a number"),
    ({"metrics": {"snks": {}}}, "did you mean sinks?"),
    ({"metrics": [{"sinks": {}}]}, "metrics: the dict .*; give names"),
    ({"metrics": [["sinks", {}]]}, "metrics: the list"),
    ({"metrics": [("sinks",)]}, "metrics: the tuple"),
    ({"metrics": 5}, "metrics: the int 5; give names"),
    ({"metrics": None}, "metrics: None"),
    ({"metrics": []}, "no metric was asked for"),
    ({"texts": 5}, "texts: got int; give `bundled`"),
    ({"texts": None}, "texts: got NoneType"),
    ({"texts": {"a": "b"}}, "texts: got dict"),
    ({"texts": b"abc"}, "texts: got bytes"),
    ({"texts": [1]}, "text 0 is of type int"),
    ({"n_texts": "3"}, "n_texts is '3'; give a whole number"),
    ({"n_texts": True}, "n_texts is True"),
    ({"max_tokens": 4.0}, "max_tokens is 4.0"),
    ({"batch_tokens": None}, "batch_tokens is None"),
    ({"seed": 1.5}, "seed is 1.5; give a whole number of at least 0"),
    ({"seed": True}, "seed is True"),
    ({"seed": "0"}, "seed is '0'"),
    ({"seed": -1}, "seed is -1"),
    ({"bos": 1}, "bos is the int 1; give text"),
    ({"bos": "alway"}, "did you mean always?"),
    ({"positions": "nope"}, "positions is the str 'nope'; give a dict from labels"),
    ({"positions": ["nope"]}, "positions is the list"),
    ({"positions": {"typo": "nope"}}, "no model is labelled 'typo'; known: llama"),
    ({"positions": {"llama": "nop"}}, "positions of 'llama': 'nop'; did you mean nope?"),
    ({"positions": {"llama": None}}, "positions of 'llama': None"),
    ({"positions": {"llama": "nope"}}, "positions is 'nope', but llama is loaded already, with rope"),
    ({"device": "cuda"}, "device is 'cuda', but llama is loaded already, with cpu; give device to phaselens.load"),
    ({"device": 3}, "device is the int 3"),
    ({"dtype": "bf16"}, "dtype is 'bf16', but llama is loaded already, with float32"),
    ({"dtype": torch.float64}, "dtype is 'float64', but llama is loaded"),
    ({"dtype": 32}, "dtype is the int 32"),
    ({"observer": "loud"}, "observer: the str 'loud' has no method 'loading'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), RUNS, ids=range(len(RUNS)))
def test_run_refuses_what_it_would_ignore(lens: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.run(lens, **({"metrics": "sinks", "texts": TEXTS} | arguments))


@pytest.mark.parametrize("arguments", [
    {"dtype": torch.float32}, {"dtype": "fp32"}, {"dtype": "torch.float32"}, {"device": "cpu"},
    {"positions": {"llama": "auto"}}, {"positions": None}, {"texts": tuple(TEXTS)},
])  # fmt: skip
def test_run_takes_what_agrees_with_a_loaded_model(lens: Any, arguments: dict[str, Any]) -> None:
    run = phaselens.run(lens, **({"metrics": "sinks", "texts": TEXTS} | arguments))
    assert rates(run) == rates(phaselens.run(lens, metrics="sinks", texts=TEXTS))


def test_a_nulled_lens_agrees_with_nope() -> None:
    lens = phaselens.load(tiny_model("llama"), label="null", positions="nope", check=False)
    lens.text_tokenizer = toy_lens().text_tokenizer
    assert phaselens.run(lens, metrics="sinks", texts=TEXTS, positions={"null": "nope"}).failed == []


def test_a_dtype_object_reaches_models_named_by_text(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    run = phaselens.run(folder, metrics="sinks", texts=TEXTS, dtype=torch.float64)
    assert run.models[0].info.dtype == "float64"
    assert run.options["dtype"] == "float64"


@pytest.mark.parametrize(("models", "message"), [
    (None, "models: NoneType is no lens"),
    (5, "models: int is no lens"),
    ({"a": "rope"}, "models: the dict .*; give a list of names and lenses"),
    ([], "no model was given"),
    (["rope", 3], "models: int is no lens"),
])  # fmt: skip
def test_models_that_are_none(models: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.run(models, metrics="sinks", texts=TEXTS)


def test_a_dtype_that_is_none_is_found_before_a_model_is_looked_for() -> None:
    with pytest.raises(InputError, match="dtype 'int8' is not known"):
        phaselens.run(["./nowhere", "rope"], metrics="sinks", texts=TEXTS, dtype="int8")


LOADS: list[tuple[dict[str, Any], str]] = [
    ({"revision": "main"}, "revision='main' says nothing of a model object; leave it out"),
    ({"trust_remote_code": True}, "trust_remote_code=True says nothing of a model object"),
    ({"allow_pickle": True}, "allow_pickle=True says nothing of a model object"),
    ({"check": "maybe"}, "check is 'maybe'; give True, False or 'report'"),
    ({"label": 3}, "label is 3; give text"),
    ({"label": ""}, "label is ''"),
    ({"trust_remote_code": "no"}, "trust_remote_code is 'no'; give True or False"),
    ({"positions": "nop"}, "positions 'nop': use auto"),
    ({"device": 3}, "device is of type int"),
    ({"dtype": 3}, "dtype is of type int"),
    ({"tokenizer": 3}, "tokenizer is a int"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), LOADS, ids=range(len(LOADS)))
def test_load_refuses_what_it_would_ignore(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.load(tiny_model("llama"), **arguments)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"revision='main' says nothing of '.*', a folder"):
        phaselens.load(save_checkpoint(tmp_path / "tiny"), revision="main")


def test_options_are_checked_wherever_they_are_made() -> None:
    with pytest.raises(InputError, match="seed is None"):
        Options(seed=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positions is None"):
        Options(positions=None)  # type: ignore[arg-type]


def test_a_tiny_model_has_no_fields_of_another_name() -> None:
    with pytest.raises(
        InputError, match="LlamaConfig has no field 'num_hiden_layers'; did you mean num_hidden_layers"
    ):
        tiny_model("llama", num_hiden_layers=3)
    with pytest.raises(InputError, match="GPT2Config has no field 'num_key_value_heads'"):
        tiny_model("gpt2", num_key_value_heads=1)


def test_stream_has_no_logits_below_the_top(lens: Any) -> None:
    tokens = torch.tensor([[0, 5]])
    with pytest.raises(InputError, match="leave unembed out"):
        lens.stream(tokens, stop_at_layer=1, unembed=True)
    with pytest.raises(InputError, match="got a list"):
        lens.stream([[0, 5]])


STREAMS: list[tuple[dict[str, Any], str]] = [
    ({"lengths": "two"}, r"lengths: expected a tensor \[batch\] of whole numbers, got str"),
    ({"lengths": torch.tensor([2.0])}, "lengths: expected"),
    (
        {"lengths": torch.tensor([True])},
        r"lengths: expected a tensor \[batch\] of whole numbers, got torch.bool",
    ),
    (
        {"lengths": torch.tensor([[2]])},
        r"lengths: expected a tensor \[batch\] of whole numbers, got \[1, 1\]",
    ),
    ({"sink_position": 1.5}, "sink_position as a whole number"),
    ({"sink_position": -1}, "sink position -1: positions are counted from 0"),
    ({"n_distances": True}, "n_distances as a whole number"),
    ({"unembed": "no"}, "unembed as True or False"),
]


@pytest.mark.parametrize(("arguments", "message"), STREAMS, ids=range(len(STREAMS)))
def test_stream_refuses_what_it_would_ignore(lens: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lens.stream(torch.tensor([[0, 5]]), **arguments)


@pytest.mark.parametrize("layer", [-1, 2, True, 1.5])
@pytest.mark.parametrize("name", ["attn.W_O", "ln1.weight"])
def test_layers_are_not_counted_from_the_end(lens: Any, layer: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"llama has layers 0 to 1, and no layer {layer}"):
        lens.weight_of(layer, name)


ENCODINGS: list[tuple[Callable[[Encoder], Any], str]] = [
    (lambda encoder: encoder.tokens(Text("a", "a b c"), -1), "max_tokens as a whole number of at least 1"),
    (lambda encoder: encoder.tokens(Text("a", "a b c"), None), "max_tokens"),  # type: ignore[arg-type]
    (lambda encoder: encoder.tokens("a b c", 4), "takes a phaselens.data.Text and got str"),  # type: ignore[arg-type]
    (lambda encoder: Encoder(encoder.tokenizer, bos_token_id="<s>"), "bos_token_id as a whole number"),  # type: ignore[arg-type]
    (lambda encoder: Encoder(None), "a Hugging Face tokenizer and got NoneType"),
    (lambda encoder: Text(3, "a"), "a Text's id is of type int"),  # type: ignore[arg-type]
    (lambda encoder: Text("a", None), "a Text's text is of type NoneType"),  # type: ignore[arg-type]
    (lambda encoder: texts_from(["a", "b"], True), "limit as a whole number"),
    (lambda encoder: pack([3, 4], -1), "batch_tokens as a whole number of at least 1"),
]


@pytest.mark.parametrize(("call", "message"), ENCODINGS, ids=range(len(ENCODINGS)))
def test_texts_and_tokens_say_what_they_take(lens: Any, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(lens.encoder())


def qkv() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    return x, attention.attend(x, x, x, scale=0.5)[1]


def sink(**options: Any) -> Any:
    x, lse = qkv()
    return attention.sink_mass(x, x, lse, **({"scale": 0.5} | options))


ROWS = torch.rand(1, 2, 5)
LENGTHS = torch.tensor([5])
LOSSES = np.arange(12.0).reshape(6, 2)

PURE: list[tuple[Callable[[], Any], str]] = [
    (lambda: sink(window=2.5), "window as a whole number of at least 1, received 2.5"),
    (lambda: sink(window=True), "window as a whole number"),
    (lambda: sink(scale="x"), "scale as a number, received 'x'"),
    (lambda: sink(scale=float("nan")), "scale as a number, received nan"),
    (lambda: sink(softcap="3"), "softcap as a number"),
    (lambda: sink(position=1.5), "position as a whole number"),
    (lambda: attention.attend(LOSSES, LOSSES, LOSSES, scale=1.0), "q and k as tensors, received ndarray"),  # type: ignore[arg-type]
    (lambda: attention.window_mass(qkv()[0], qkv()[0], qkv()[1], 2.5, scale=0.5), "width as a whole number"),  # type: ignore[arg-type]
    (lambda: attention.distance_mass(qkv()[0], qkv()[0], qkv()[1], longest="3", scale=0.5), "longest as a whole"),  # type: ignore[arg-type]
    (lambda: attention.received_mass(qkv()[0], qkv()[0], qkv()[1], lengths=[5], scale=0.5), "lengths .* received list"),  # type: ignore[arg-type]
    (lambda: attention.summarise(qkv()[0], qkv()[0], qkv()[1], entropy="no", scale=0.5), "entropy as True or False"),  # type: ignore[arg-type]
    (lambda: attention.query_mean(ROWS, torch.tensor([4.5])), "lengths .* received torch.float32"),
    (lambda: attention.query_mean(ROWS, LENGTHS, first=-1), "first as a whole number of at least 0"),
    (lambda: attention.query_mean(ROWS, LENGTHS, last=1.5), "last as a whole number"),  # type: ignore[arg-type]
    (lambda: attention.query_mean(ROWS, LENGTHS, last=-1), "last as a whole number of at least 0"),
    (lambda: attention.query_mean([[[1.0]]], LENGTHS), "rows as a tensor, received list"),  # type: ignore[arg-type]
    (lambda: attention.sink_score(ROWS, LENGTHS, window=0), "window of at least 1 key"),
    (lambda: attention.sink_score(ROWS, LENGTHS, window=True), "window as a whole number"),
    (lambda: attention.sink_score(None, LENGTHS), "sink as a tensor"),  # type: ignore[arg-type]
    (lambda: attention.sink_score(ROWS, LENGTHS, position=-1), "position as a whole number"),
    (lambda: attention.normalised_entropy(ROWS, window=0), "window as a whole number"),
    (lambda: attention.massive_cells(torch.rand(2, 4), over="perhead"), "global or per_head, received 'perhead'"),  # type: ignore[arg-type]
    (lambda: attention.massive_cells(torch.rand(2, 4), multiple=-1), "multiple as a number of at least 0"),
    (lambda: attention.uniform_entropy(4, 2.5), "window as a whole number"),  # type: ignore[arg-type]
    (lambda: attention.uniform_sink(4, include_query0="no"), "include_query0 as True or False"),  # type: ignore[arg-type]
    (lambda: attention.explicit_pattern(torch.zeros(1, 2, 5, 5), sinks=torch.zeros(3)), "sinks .head. = .2,."),
    (lambda: spectrum.spectrum(LOSSES), "received a ndarray"),  # type: ignore[arg-type]
    (lambda: spectrum.spectrum(torch.rand(4)), r"received a tensor \[4\]"),
    (lambda: spectrum.spectra(torch.rand(3, 4), torch.tensor([1, 0, 0])), "left_out as bool"),
    (lambda: spectrum.massive_activations(torch.rand(3, 4), n=0), "n as a whole number of at least 1"),
    (lambda: spectrum.massive_rows(torch.rand(4), factor=-1), "factor as a number of at least 0"),
    (lambda: spectrum.random_rows([1.0, 2.0], 2.5), "d as a whole number"),  # type: ignore[arg-type]
    (lambda: spectrum.balance(torch.rand(3, 4), torch.rand(2, 4)), "of one shape"),
    (lambda: uncertainty.mean_interval(LOSSES, seed=True), "seed as a whole number"),
    (lambda: uncertainty.mean_interval(LOSSES, n_resamples=9.5), "n_resamples as a whole number"),  # type: ignore[arg-type]
    (lambda: uncertainty.mean_interval(LOSSES, confidence="x"), "confidence as a number"),  # type: ignore[arg-type]
    (lambda: uncertainty.mean_interval(LOSSES, transform=5), "transform as a function"),  # type: ignore[arg-type]
    (lambda: uncertainty.compare_arms(LOSSES[:, 0], LOSSES, n_permutations=True), "n_permutations as a whole number"),
    (lambda: uncertainty.compare_arms(LOSSES[:, 0], LOSSES, seed=1.5), "seed as a whole number"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), PURE, ids=range(len(PURE)))
def test_pure_functions_say_what_they_take(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("text", "spec"), [
    ("gpt2", ModelSpec("gpt2")),
    ("gpt2@main", ModelSpec("gpt2", None, "main")),
    ("label=gpt2", ModelSpec("gpt2", "label")),
])  # fmt: skip
def test_a_hub_id_needs_no_owner(text: str, spec: ModelSpec) -> None:
    assert ModelSpec.parse(text) == spec
