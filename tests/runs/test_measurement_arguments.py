"""Arguments that would be ignored or cannot be used are refused with a clear message."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.data import TextFields
from phaselens.errors import InputError
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


def test_a_tuple_of_names_is_not_a_pair(lens: Any) -> None:
    assert list(phaselens.run(lens, metrics=("sinks", "bos-norm"), texts=TEXTS).metrics) == [
        "sinks",
        "bos-norm",
    ]


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"metrics": [("sinks", None)]}, "metric 'sinks': its parameters are None; give a dict"),
    ({"metrics": {"sinks": None}}, "metric 'sinks': its parameters are None; give a dict"),
    ({"metrics": {"sinks": 0.3}}, "its parameters are the float 0.3"),
    ({"metrics": {"sinks": {"treshold": 0.3}}}, "sinks: no parameter 'treshold'; did you mean threshold?"),
    ({"metrics": {"sinks": {"threshold": "high"}}}, "threshold is 'high'; give a number"),
    ({"metrics": {"snks": {}}}, "did you mean sinks?"),
    ({"metrics": [{"sinks": {}}]}, "metrics: the dict .*; give names"),
    ({"metrics": [["sinks", {}]]}, "metrics: the list"),
    ({"metrics": [("sinks",)]}, "metrics: the tuple"),
    ({"metrics": 5}, "metrics: the int 5; give names"),
    ({"metrics": None}, "metrics: None"),
    ({"metrics": []}, "no metric was requested"),
    ({"texts": 5}, "expected texts as `bundled`, a file's name, or a list of strings, received 5"),
    ({"texts": None}, "expected texts as `bundled`.*, received None"),
    ({"texts": {"a": "b"}}, "expected texts as `bundled`.*, received {'a': 'b'}"),
    ({"texts": b"abc"}, "expected texts as `bundled`.*, received b'abc'"),
    ({"texts": [1]}, "expected text 0 as a string or a phaselens.data.Text, received 1"),
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
    ({"positions": {"llama": "nope"}}, "positions is 'nope', but llama is already loaded, with rope"),
    ({"device": "cuda"}, "device is 'cuda', but llama is already loaded, with cpu; give device to phaselens.load"),
    ({"device": 3}, "device is the int 3"),
    ({"dtype": "bf16"}, "dtype is 'bf16', but llama is already loaded, with float32"),
    ({"dtype": torch.float64}, "dtype is 'float64', but llama is already loaded"),
    ({"dtype": 32}, "dtype is the int 32"),
    ({"positions": {"llama": ["nope"]}}, r"positions of 'llama': \['nope'\]"),
    ({"adapter_scale": {"llama": 0.5}}, "adapter_scale is 0.5, but llama is already loaded, with no adapter"),
    ({"adapter_scale": 0.5}, "no model named by text has an adapter"),
    ({"seed": 10**5000}, "seed is int; give a whole number of at least 0 and at most 9223372036854775807"),
    ({"max_tokens": -(10**5000)}, "max_tokens is int; give a whole number of at least 1"),
    ({"n_texts": 10**26}, "n_texts is 10{26}; give a whole number of at least 1 and at most"),
    ({"texts": ""}, "texts '': expected `bundled`"),
    ({"texts": {"a set has no order"}}, "expected texts as"),
    ({"texts": ["\ud800"]}, "text 0: symbol 1 is a lone surrogate"),
    ({"texts": "\ud800.txt"}, "does not exist"),
    ({"text_fields": TextFields("body")}, "text_fields has no effect on a list of texts"),
    ({"texts": "bundled", "text_fields": TextFields("body")}, "text_fields has no effect on 'bundled'"),
    ({"metrics": {"sinks": {3: 1}}}, "sinks: no parameter 3"),
    ({"metrics": {"sinks": {"sink_position": 10**30}}}, "sink_position is 10{30}; give a whole number"),
    ({"metrics": {"sinks": {"sink_position": 10**5000}}}, "sink_position is int; give a whole number"),
    ({"metrics": {"sinks": {"threshold": 10**5000}}}, "threshold is int; give a number"),
    ({"out": "a\0b"}, "out is .*, which no directory can be called"),
    ({"out": "\ud800"}, "out is .*, which no directory can be called"),
    ({"observer": "loud"}, "observer: the str 'loud' has no method 'loading'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), RUNS, ids=range(len(RUNS)))
def test_run_refuses_options_that_it_would_ignore(lens: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.run(lens, **({"metrics": "sinks", "texts": TEXTS} | arguments))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    {"dtype": torch.float32}, {"dtype": "fp32"}, {"dtype": "torch.float32"}, {"device": "cpu"},
    {"positions": {"llama": "auto"}}, {"positions": None}, {"texts": tuple(TEXTS)},
])  # fmt: skip
def test_run_accepts_options_that_agree_with_a_loaded_model(lens: Any, arguments: dict[str, Any]) -> None:
    run = phaselens.run(lens, **({"metrics": "sinks", "texts": TEXTS} | arguments))
    assert rates(run) == rates(phaselens.run(lens, metrics="sinks", texts=TEXTS))


def test_a_nulled_lens_agrees_with_nope() -> None:
    lens = phaselens.load(tiny_model("llama"), label="null", positions="nope", check=False)
    lens.text_tokenizer = toy_lens().text_tokenizer
    assert phaselens.run(lens, metrics="sinks", texts=TEXTS, positions={"null": "nope"}).failed == []


def test_a_nulled_lens_does_not_agree_with_auto() -> None:
    lens = toy_lens()
    lens.set_rotation(1, nulled=True)
    for mode in ("auto", "nope"):
        with pytest.raises(
            InputError, match=f"positions is '{mode}', but llama is already loaded, with nope, rope"
        ):
            phaselens.run(lens, metrics="sinks", texts=TEXTS, positions={"llama": mode})


def test_a_seed_of_numpy_is_a_whole_number(lens: Any) -> None:
    run = phaselens.run(
        lens, metrics={"sinks": {"sink_position": np.int64(1)}}, texts=TEXTS, seed=np.int64(3)
    )  # type: ignore[arg-type]
    assert type(run.options["seed"]) is int
    json.dumps(run.to_dict())


def test_a_dtype_object_reaches_models_named_by_text(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    run = phaselens.run(folder, metrics="sinks", texts=TEXTS, dtype=torch.float64)
    assert run.models[0].info.dtype == "float64"
    assert run.options["dtype"] == "float64"


@pytest.mark.parametrize(("models", "message"), [
    (None, "models: NoneType is not a lens"),
    (5, "models: int is not a lens"),
    ({"a": "rope"}, "models: the dict .*; give a list of names and lenses"),
    ([], "no model was given"),
    (["rope", 3], "models: int is not a lens"),
])  # fmt: skip
def test_values_that_are_not_models_are_refused(models: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        phaselens.run(models, metrics="sinks", texts=TEXTS)


def test_an_unknown_dtype_is_refused_before_a_model_is_looked_up() -> None:
    with pytest.raises(InputError, match="dtype 'int8' is not known"):
        phaselens.run(["./nowhere", "rope"], metrics="sinks", texts=TEXTS, dtype="int8")


@pytest.mark.slow
def test_fields_of_a_file_choose_its_texts_and_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,name\nCall me Ishmael.,x\n,y\n")
    run = phaselens.run(
        "rope", metrics=["sinks"], texts=tmp_path / "a.csv", text_fields=TextFields(text="body", id="name")
    )
    assert [text.id for text in run.texts] == ["x"]
    assert run.options["text_fields"] == {"text": "body", "id": "name", "label": None, "paragraphs": False}
    assert f"texts {str(tmp_path / 'a.csv')!r}: 1 empty line or record skipped" in run.warnings
    with pytest.raises(InputError, match="expected text_fields as a TextFields"):
        phaselens.run("rope", metrics=["sinks"], text_fields="body")  # type: ignore[arg-type]
