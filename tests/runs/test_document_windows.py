"""Runs on documents that are cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.data import Text
from phaselens.errors import InputError, ModelError
from tests.toys import letters, save_checkpoint, toy_lens

DOCUMENTS = [Text("long", letters(20), "prose"), Text("short", letters(3, 5), "code")]


def measured(models: Any = None, **options: Any) -> phaselens.Run:
    return phaselens.run(
        toy_lens() if models is None else models, metrics=["sinks"], texts=DOCUMENTS, **options
    )


def test_windows_are_texts_with_numbered_ids_labels_and_a_note() -> None:
    run = measured(window=8)
    assert [(text.id, text.label) for text in run.texts] == [
        ("long#0", "prose"), ("long#1", "prose"), ("long#2", "prose"), ("short", "code"),
    ]  # fmt: skip
    assert [text.n_tokens["llama"] for text in run.texts] == [8, 8, 7, 4]
    assert run.options["window"] == 8
    assert run.warnings[0] == (
        "1 document was cut into 3 windows of up to 8 tokens; each counts as a text, also in intervals"
    )


def test_a_window_measures_what_its_text_measures() -> None:
    words = letters(20).split()
    pieces = [Text(f"long#{n}", " ".join(words[7 * n : 7 * n + 7]), "prose") for n in range(3)]
    lens = toy_lens()
    direct = phaselens.run(lens, metrics=["sinks"], texts=[*pieces, DOCUMENTS[1]])
    assert measured(lens, window=8).rows("sinks", "texts").rows == direct.rows("sinks", "texts").rows


def test_a_long_window_is_not_cut_by_max_tokens() -> None:
    run = measured(window=15, max_tokens=4)
    assert [text.n_tokens["llama"] for text in run.texts] == [15, 7, 4]
    assert run.options["max_tokens"] == 15


@pytest.mark.slow
def test_models_named_by_text_are_cut_by_the_first_ones_tokenizer(tmp_path: Path) -> None:
    checkpoints = [f"{name}={save_checkpoint(tmp_path / name, seed=n)}" for n, name in enumerate("ab")]
    run = measured(checkpoints, window=8, stride=4, out=tmp_path / "run")
    note = "windows of up to 8 tokens, 4 apart by the tokenizer of a; each counts as a text"
    assert any(note in warning for warning in run.warnings)
    assert [text.id for text in run.texts] == ["long#0", "long#1", "long#2", "long#3", "long#4", "short"]
    again = measured(checkpoints, window=8, stride=4, out=tmp_path / "run")
    assert again.to_dict() == run.to_dict()
    with pytest.raises(InputError, match="--stride: 4, now 5"):
        measured(checkpoints, window=8, stride=5, out=tmp_path / "run")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stride is the distance between windows; give window too"):
        measured(stride=4)
    with pytest.raises(InputError, match="window is 0; give a whole number of at least 1"):
        measured(window=0)
    with pytest.raises(InputError, match="a window and a text have the id 'long#1'"):
        phaselens.run(toy_lens(), metrics=["sinks"], texts=[*DOCUMENTS, Text("long#1", letters(2))], window=8)
    folder = save_checkpoint(tmp_path / "bare")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="model 'bare' has no tokenizer for the texts: "):
        measured(str(folder), window=8)
