"""The result of a run: JSON, tables, warnings and its options."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.data import Text
from phaselens.errors import InputError, ModelError
from phaselens.runs import Observer
from phaselens.testing import tiny_model
from tests.runs.metrics import probe
from tests.toys import letters, save_checkpoint, toy_lens, toy_tokenizer

TEXTS = [letters(length, length) for length in (4, 9, 2)]
TABLES = {
    "texts": "model text layer head score score_all null null_all learned_sink learned_sink_null n_tokens",
    "heads": "model layer head score ci_low ci_high null learned_sink learned_sink_low learned_sink_high "
    "learned_sink_null n_texts",
    "layers": "model layer sink_rate ci_low ci_high null_rate mean_score learned_sink",
    "summary": "model sink_rate mean_score learned_sink n_texts",
    "positions": "model layer head position share score null n_texts",
    "strongest": "model text layer head position score null",
}


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(label="one")


@pytest.fixture(scope="module")
def pair(lens: Any) -> Any:
    """A run of two models, of which the second has no BOS and different tokens."""
    second_lens = toy_lens("llama-drope-nope", label="two")
    second_lens.text_tokenizer = toy_tokenizer(adds_bos=False)
    return phaselens.run([lens, second_lens], metrics=["sinks"], texts=TEXTS, max_tokens=9)


def test_the_json_is_strict_and_has_the_published_keys(pair: Any) -> None:
    document = json.loads(json.dumps(pair.to_dict(), allow_nan=False))
    assert document == pair.to_dict()
    assert document["schema"] == "phaselens.run/1"
    assert set(document) == {
        "schema", "models", "texts", "metrics", "warnings", "seed", "options", "versions",
    }  # fmt: skip
    model = document["models"][1]
    assert (model["label"], model["family"], model["n_layers"]) == ("two", "llama_drope", 2)
    assert model["positions"] == ["nope", "nope"]
    assert {"source", "n_heads", "n_kv_heads", "d_head", "dtype", "device", "bos_token_id"} <= set(model)
    assert set(document["metrics"]) == {"sinks"}
    sinks = document["metrics"]["sinks"]
    assert {"version", "status", "params", "tables"} <= set(sinks)
    assert (sinks["status"], sinks["errors"]) == ("ok", [])
    assert sinks["params"]["threshold"] == 0.3
    assert {"python", "phaselens", "torch", "transformers"} <= set(document["versions"])


def test_tables_have_the_published_columns_each_with_a_unit_field(pair: Any) -> None:
    tables = pair.to_dict()["metrics"]["sinks"]["tables"]
    assert {
        name: " ".join(column["name"] for column in table["columns"]) for name, table in tables.items()
    } == TABLES
    for table in tables.values():
        assert all(set(column) == {"name", "unit"} for column in table["columns"])
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert [row[0] for row in table["rows"]] == sorted(row[0] for row in table["rows"])  # one, then two


def test_texts_are_hashed_whole_and_counted_by_model(pair: Any) -> None:
    texts = pair.to_dict()["texts"]
    assert [text["id"] for text in texts] == ["0", "1", "2"]
    assert texts[1] == {
        "id": "1",
        "n_tokens": 9,
        "sha256": hashlib.sha256(TEXTS[1].encode()).hexdigest(),
        "n_tokens_by_model": {"one": 9, "two": 9},
        "truncated": True,
    }
    assert texts[0]["n_tokens_by_model"] == {"one": 5, "two": 4}
    assert texts[0]["truncated"] is False


def test_facts_that_a_reader_needs_are_in_the_warnings(pair: Any) -> None:
    assert pair.warnings == [
        "one: 1 of 3 texts were cut to 9 tokens",
        "two: texts got no BOS token: position 0 is a text's own first token (bos: auto)",
    ]
    models = pair.to_dict()["models"]
    assert [(model["first_token_id"], model["starts_with_bos"]) for model in models] == [
        (0, True),
        (None, False),
    ]
    assert [(model["bos"], model["n_tokens"]) for model in models] == [("auto", 17), ("auto", 15)]


@pytest.mark.parametrize(("bos", "n_tokens"), [("always", [5, 10, 3]), ("never", [4, 9, 2])])
def test_the_bos_policy_can_be_forced(lens: Any, bos: str, n_tokens: list[int]) -> None:
    run = phaselens.run(lens, metrics="sinks", texts=TEXTS, bos=bos)
    assert [text.n_tokens["one"] for text in run.texts] == n_tokens
    assert run.models[0].starts_with_bos is (bos == "always")
    assert run.options["bos"] == bos


def test_a_text_longer_than_the_trained_length_gives_a_warning() -> None:
    short = toy_lens(max_position_embeddings=8)
    run = phaselens.run(short, metrics="sinks", texts=TEXTS)
    assert "llama: texts of up to 10 tokens, but the model was made for 8" in run.warnings


def test_tables_are_arrow_tables(pair: Any) -> None:
    table = pair.table("sinks", "layers")
    assert table.schema.names == TABLES["layers"].split()
    assert table.num_rows == 4
    assert table.schema.field("sink_rate").metadata == {b"unit": b"share of heads"}
    with pytest.raises(InputError, match=r"the run has no metric 'sink'; did you mean sinks\?"):
        pair.table("sink", "layers")
    with pytest.raises(InputError, match=r"metric 'sinks' has no table 'layer'; did you mean layers\?"):
        pair.table("sinks", "layer")


def test_printing_a_run_shows_its_table(pair: Any) -> None:
    text = str(pair)
    assert "sink rate" in text
    assert "one" in text
    assert "two" in text
    assert repr(pair) == "<Run of sinks on one, two, 3 texts>"


def test_a_metric_class_works_like_its_name(lens: Any) -> None:
    metric = probe()
    run = phaselens.run(lens, metrics=[metric, "sinks"], texts=[Text("mine", TEXTS[0])])
    assert list(run.metrics) == ["probe", "sinks"]
    assert run.rows("probe", "texts").column("text") == ["mine", "mine"]
    assert run.metrics["probe"].distribution == "module tests.runs.metrics"


@pytest.mark.slow
def test_models_are_loaded_by_source_and_label_and_positions_apply_by_label(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "base")
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "a b c", "id": "x"}\n{"text": "d e"}\n')
    run = phaselens.run(
        [folder, f"turned={folder}"], metrics="sinks", texts=texts, positions={"turned": "nope"}, n_texts=2
    )
    assert [(model.info.label, model.info.positions_summary) for model in run.models] == [
        ("base", "rope"),
        ("turned", "nope"),
    ]
    assert [text.id for text in run.texts] == ["x", "t:2"]
    assert run.options["positions"] == {"turned": "nope"}
    assert run.options["texts"] == str(texts)
    scores = [
        run.table("sinks", "texts").column("score").to_pylist()[part] for part in (slice(16), slice(16, 32))
    ]
    assert scores[0] != scores[1]


@pytest.mark.slow
def test_only_one_model_named_by_source_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    import phaselens.lens

    folder = save_checkpoint(tmp_path / "base")
    alive: list[Any] = []
    loaded = phaselens.lens.load

    def load(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        lens = loaded(*args, **kwargs)
        alive.append(weakref.ref(lens))
        return lens

    monkeypatch.setattr(phaselens.lens, "load", load, raising=False)
    phaselens.run([f"a={folder}", f"b={folder}"], metrics="sinks", texts=TEXTS)
    assert len(alive) == 2


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ([], InputError, "no model was given"),
        (["a=rope", "a=drope"], InputError, "two models are labelled 'a'"),
        ([3], InputError, "models: int is not a lens"),
        (["no/such/folder/here"], ModelError, "no such folder"),
    ],
)
def test_models_that_cannot_be_used_are_refused(
    models: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        phaselens.run(models, metrics="sinks", texts=TEXTS)


def test_a_missing_second_model_is_found_before_the_first_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phaselens.lens

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    folder = save_checkpoint(tmp_path / "base")
    monkeypatch.setattr(phaselens.lens, "load", refuse, raising=False)
    with pytest.raises(ModelError, match="no such folder"):
        phaselens.run([folder, "./not-there"], metrics="sinks", texts=TEXTS)


def test_a_bare_model_object_is_refused_with_a_hint_to_load_it() -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM is not a lens; make one with phaselens\.load"):
        phaselens.run(tiny_model("llama"), metrics="sinks", texts=TEXTS)


def test_a_model_without_a_tokenizer_cannot_be_given_texts() -> None:
    bare_lens = phaselens.load(tiny_model("llama"), label="bare", check=False)
    with pytest.raises(ModelError, match="model 'bare' has no tokenizer for the texts"):
        phaselens.run(bare_lens, metrics="sinks", texts=TEXTS)


def test_positions_of_a_missing_model_are_refused(lens: Any) -> None:
    with pytest.raises(InputError, match=r"no model is labelled 'on'; did you mean one\?"):
        phaselens.run(lens, metrics="sinks", texts=TEXTS, positions={"on": "nope"})


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    small = toy_lens(vocab_size=10)
    with pytest.raises(InputError, match="encode the text with this model's tokenizer"):
        phaselens.run(small, metrics="sinks", texts=TEXTS)


def test_progress_moves_by_layers_within_a_batch() -> None:
    class ReadingsOfBatches(Observer):
        def __init__(self) -> None:
            self.readings: list[float] = []

        def reading(self, n_tokens: float) -> None:
            self.readings.append(n_tokens)

        def advance(self, n_tokens: int) -> None:
            self.readings.append(n_tokens)

    readings = ReadingsOfBatches()
    phaselens.run(toy_lens(), metrics=["bos-norm"], texts=[letters(8)], observer=readings)
    n_layers = toy_lens().info.n_layers
    n_tokens = readings.readings[-1]
    assert readings.readings[:-1] == [n_tokens * layer / n_layers for layer in range(n_layers)]
