"""A model argument is identified once, and then passed on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import phaselens
from phaselens.errors import InputError, ModelError
from phaselens.lens.model_source import BUNDLED, ModelSource
from phaselens.runs import ModelSpec, load_model
from tests.toys import save_checkpoint


@pytest.fixture
def identified(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each name is identified."""
    counts: Counter[str] = Counter()
    original = ModelSource.identify.__func__

    def identify(cls: type[ModelSource], name: str, revision: str | None = None) -> ModelSource:
        counts[name] += 1
        return original(cls, name, revision)

    monkeypatch.setattr(ModelSource, "identify", classmethod(identify))
    return counts


def test_a_name_is_one_of_phaselens_a_path_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in (*BUNDLED, "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").touch()
    kind_by_name = {
        name: ModelSource.identify(name).kind
        for name in (*BUNDLED, "smollm2", "mine", "notes", "gpt2", "a\0b")
    }
    assert kind_by_name == {
        "rope": "bundled",
        "drope": "bundled",
        "smollm2": "packaged",
        "mine": "folder",
        "notes": "file",
        "gpt2": "other",
        "a\0b": "other",
    }
    assert Path(ModelSource.identify("rope").location, "config.json").is_file()
    assert ModelSource.identify("gpt2", "main") == ModelSource("gpt2", "other", None, "main")
    assert ModelSource.identify("gpt2").folder is None
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        _ = ModelSource.identify("mine").location
    with pytest.raises(ModelError, match="'notes' is a file"):
        _ = ModelSource.identify("notes").folder


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = save_checkpoint(tmp_path / "base")
    assert ModelSource.identify("~/base").location == str(folder)
    assert ModelSource.identify("~nobody-of-this-name/base").kind == "other"


@pytest.mark.slow
def test_each_model_of_a_run_is_identified_once(tmp_path: Path, identified: Counter[str]):
    base, twin = (str(save_checkpoint(tmp_path / name)) for name in ("base", "twin"))
    run = phaselens.run([base, f"twin={twin}"], metrics="sinks", texts=["to be or not to be"])
    assert [model.info.source for model in run.models] == [base, twin]
    assert identified == {base: 1, f"twin={twin}": 1, twin: 1}


@pytest.mark.slow
def test_loading_identifies_once(tmp_path: Path, identified: Counter[str]):
    folder = save_checkpoint(tmp_path / "base")
    phaselens.load(folder, check=False)
    assert identified == {str(folder): 1}
    spec = ModelSpec.parse(f"label={folder}")
    identified.clear()
    load_model(spec, check=False)
    phaselens.load(spec.identified, check=False)
    assert not identified


def test_a_source_has_its_revision(tmp_path: Path):
    source = ModelSource.identify(str(save_checkpoint(tmp_path / "base")), "main")
    with pytest.raises(InputError, match=r"revision='main' has no effect on .*, a folder"):
        phaselens.load(source)
    with pytest.raises(InputError, match="revision='v1' has no effect on a ModelSource"):
        phaselens.load(source, revision="v1")
