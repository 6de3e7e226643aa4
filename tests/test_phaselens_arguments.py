"""Arguments of public callables outside of runs that would be ignored or cannot be used are refused."""

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
from phaselens.testing import tiny_model
from tests.toys import save_checkpoint, toy_lens


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


LOADS: list[tuple[dict[str, Any], str]] = [
    ({"revision": "main"}, "revision='main' has no effect on a model object; leave it out"),
    ({"trust_remote_code": True}, "trust_remote_code=True has no effect on a model object"),
    ({"allow_pickle": True}, "allow_pickle=True has no effect on a model object"),
    ({"check": "maybe"}, "check is 'maybe'; give True, False or 'report'"),
    ({"label": 3}, "label is 3; give text"),
    ({"label": ""}, "label is ''"),
    ({"trust_remote_code": "no"}, "trust_remote_code is 'no'; give True or False"),
    ({"label": "\ud800"}, "label: symbol 1 is a lone surrogate"),
    ({"positions": "nop"}, "positions 'nop': use auto"),
    ({"positions": ["nope"]}, r"positions \['nope'\]: use auto"),
    ({"tokenizer": len}, "expected tokenizer as a tokenizer, or .*, received <built-in function len>"),
    ({"device": 3}, "device is 3; give auto"),
    ({"dtype": 3}, "dtype is 3; give auto"),
    ({"tokenizer": 3}, "expected tokenizer as a tokenizer, or .*, received 3"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), LOADS, ids=range(len(LOADS)))
def test_load_refuses_options_that_it_would_ignore(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.load(tiny_model("llama"), **arguments)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"revision='main' has no effect on '.*', a folder"):
        phaselens.load(save_checkpoint(tmp_path / "tiny"), revision="main")


def test_a_tiny_model_refuses_unknown_fields() -> None:
    with pytest.raises(
        InputError, match="LlamaConfig has no field 'num_hiden_layers'; did you mean num_hidden_layers"
    ):
        tiny_model("llama", num_hiden_layers=3)
    with pytest.raises(InputError, match="GPT2Config has no field 'num_key_value_heads'"):
        tiny_model("gpt2", num_key_value_heads=1)


def test_stream_has_no_logits_below_the_top(lens: Any) -> None:
    tokens = torch.tensor([[0, 5]])
    with pytest.raises(InputError, match="omit unembed"):
        lens.stream(tokens, stop_at_layer=1, unembed=True)
    with pytest.raises(InputError, match="received list"):
        lens.stream([[0, 5]])


STREAMS: list[tuple[dict[str, Any], str]] = [
    ({"lengths": "two"}, r"expected lengths as a tensor \[batch\] of whole numbers, received str"),
    ({"lengths": torch.tensor([2.0])}, "expected lengths"),
    (
        {"lengths": torch.tensor([True])},
        r"expected lengths as a tensor \[batch\] of whole numbers, received torch.bool",
    ),
    (
        {"lengths": torch.tensor([[2]])},
        r"expected lengths as a tensor \[batch\] of whole numbers, received \[1, 1\]",
    ),
    ({"sink_position": 1.5}, "sink_position as a whole number"),
    ({"sink_position": -1}, "sink position -1: positions are counted from 0"),
    ({"n_distances": True}, "n_distances as a whole number"),
    ({"unembed": "no"}, "unembed as True or False"),
]


@pytest.mark.parametrize(("arguments", "message"), STREAMS, ids=range(len(STREAMS)))
def test_stream_refuses_arguments_that_it_would_ignore(
    lens: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lens.stream(torch.tensor([[0, 5]]), **arguments)


@pytest.mark.parametrize("layer", [-1, 2, True, 1.5])
@pytest.mark.parametrize("name", ["attn.W_O", "ln1.weight"])
def test_layers_are_not_counted_from_the_end(lens: Any, layer: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"llama has layers 0 to 1, and no layer {layer}"):
        lens.weight_of(layer, name)


ENCODINGS: list[tuple[Callable[[Encoder], Any], str]] = [
    (lambda encoder: encoder.tokenize(Text("a", "a b c"), -1), "max_tokens as a whole number of at least 1"),
    (lambda encoder: encoder.tokenize(Text("a", "a b c"), None), "max_tokens"),  # type: ignore[arg-type]
    (
        lambda encoder: encoder.tokenize("a b c", 4),
        "expected text as a phaselens.data.Text, received 'a b c'",
    ),  # type: ignore[arg-type]
    (lambda encoder: Encoder(encoder.tokenizer, bos_token_id="<s>"), "bos_token_id as a whole number"),  # type: ignore[arg-type]
    (lambda encoder: Encoder(None), "expected tokenizer as a Hugging Face tokenizer, received None"),
    (lambda encoder: Text(3, "a"), "expected id of a Text as a str, received 3"),  # type: ignore[arg-type]
    (lambda encoder: Text("a", None), "expected text of a Text as a str, received None"),  # type: ignore[arg-type]
    (lambda encoder: Text("\ud800", "a"), "id of a Text: symbol 1 is a lone surrogate"),
    (lambda encoder: Text("a", "a", "\ud800"), "label of a Text: symbol 1 is a lone surrogate"),
    (lambda encoder: encoder(3), "expected a text to encode as text, received 3"),  # type: ignore[arg-type]
    (lambda encoder: encoder("\ud800"), "a text to encode: symbol 1 is a lone surrogate"),
    (lambda encoder: texts_from(["a", "b"], True), "limit as a whole number"),
    (lambda encoder: pack([3, 4], -1), "batch_tokens as a whole number of at least 1"),
]


@pytest.mark.parametrize(("call", "message"), ENCODINGS, ids=range(len(ENCODINGS)))
def test_text_and_encoder_arguments_are_checked(lens: Any, call: Any, message: str) -> None:
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
    (
        lambda: attention.explicit_pattern(torch.zeros(1, 2, 5, 5), sink_logits=torch.zeros(3)),
        "sink_logits .head. = .2,.",
    ),
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
def test_arguments_of_pure_functions_are_checked(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
