"""A damaged tokenizer is an error that names its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import ModelError
from phaselens.lens.tokenizer_files import load_tokenizer
from tests.toys import letters, save_checkpoint

DAMAGES: list[tuple[str, dict[str, Any]]] = [
    (
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}},
    ),
    ("tokenizer.json", {"model": {}}),
    ("tokenizer.json", {"added_tokens": 3}),
    ("tokenizer.json", {"post_processor": []}),
    ("tokenizer_config.json", {"tokenizer_class": []}),
    ("tokenizer_config.json", {"model_max_length": "x"}),
    ("tokenizer_config.json", {"unk_token": 0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "fields"), DAMAGES)
def test_the_file_is_named(tmp_path: Path, file: str, fields: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    with pytest.raises(ModelError, match=rf"no tokenizer could be loaded from .*: {file} ") as raised:
        phaselens.run(folder, metrics="sinks", texts=[letters(5)])
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=rf"tokenizer '.*' could not be loaded: {file} "):
        load_tokenizer(str(folder))
