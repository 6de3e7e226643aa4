"""The bundled pair and texts as they are shipped: complete, small, and showing what their cards say."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tools.train_pair.corpus import SPECIAL
from tools.train_pair.results import RESULTS, read_log
from tools.train_pair.verify import expected_properties, through_lens

DATA = Path(str(files("phaselens.data")))
TWINS = ("rope", "drope")
ROOT = Path(__file__).parents[2]


def bundled() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "texts" / "bundled.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "models" / "rope")


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> torch.Tensor:
    """The long bundled texts, their first 256 tokens: [text, 256]."""
    ids = (tokenizer(row["text"]).input_ids for row in bundled())
    rows = [row[:256] for row in ids if len(row) >= 256]
    assert len(rows) == 10
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def measured(windows: torch.Tensor) -> dict[str, dict[str, Any]]:
    return {twin: through_lens(twin, windows) for twin in TWINS}


def test_everything_together_is_small() -> None:
    shipped = [
        path
        for folder in ("models/rope", "models/drope", "texts")
        for path in (DATA / folder).rglob("*")
        if path.is_file()
    ]
    assert len(shipped) >= 11
    assert sum(path.stat().st_size for path in shipped) <= 12_000_000


@pytest.mark.parametrize(
    ("twin", "kind", "attention"), [("rope", "llama", None), ("drope", "llama_drope", "nope")]
)
def test_an_ordinary_checkpoint_folder(twin: str, kind: str, attention: str | None) -> None:
    from safetensors import safe_open

    folder = DATA / "models" / twin
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == kind
    assert config.get("attention_type") == attention
    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    card = (folder / "README.md").read_text()
    for part in (
        "## Data",
        "## Training",
        "held-out loss",
        "## Use",
        "Not for",
        "license: mit",
        "## Licence",
    ):
        assert part in card


def test_the_twins_differ_in_weights_but_not_in_shape_or_tokenizer() -> None:
    from safetensors.torch import load_file

    rope, drope = (load_file(DATA / "models" / twin / "model.safetensors") for twin in TWINS)
    assert {name: tensor.shape for name, tensor in rope.items()} == {n: t.shape for n, t in drope.items()}
    assert any(not torch.equal(rope[name], drope[name]) for name in rope)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        rope_file, drope_file = ((DATA / "models" / twin / name).read_text() for twin in TWINS)
        assert rope_file == drope_file


def test_the_tokenizer_puts_bos_first(tokenizer: Any) -> None:
    assert 2048 <= len(tokenizer) <= 4096
    assert tokenizer("It was late.").input_ids[0] == tokenizer.bos_token_id == 0
    assert set(SPECIAL) <= set(tokenizer.all_special_tokens)


def test_bundled_texts(tokenizer: Any) -> None:
    rows = bundled()
    assert len(rows) >= 40
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    sizes = []
    for row in rows:
        assert row["id"].startswith(("dracula-", "sherlock-"))
        assert "public domain" in row["source"]
        assert not any(mark in row["text"] for mark in SPECIAL)
        ids = tokenizer(row["text"]).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["text"]
        sizes.append(len(ids))
    assert min(sizes) == 16
    assert 500 <= max(sizes) <= 512
    for low, high in ((16, 20), (26, 32), (54, 64), (108, 128), (220, 256), (460, 512)):
        assert sum(low <= size <= high for size in sizes) == 10


@pytest.mark.slow
def test_the_pair_has_the_expected_properties(measured: dict[str, dict[str, Any]]) -> None:
    properties = expected_properties(measured["rope"], measured["drope"])
    for name, (value, requirement, holds) in properties.items():
        assert holds, f"{name}: {value}, required {requirement}"


@pytest.mark.slow
def test_the_encodings_are_those_in_the_names(measured: dict[str, dict[str, Any]]) -> None:
    assert set(measured["rope"]["positions"]) == {"rope"}
    assert set(measured["drope"]["positions"]) == {"nope"}


@pytest.mark.slow
def test_the_lens_and_the_training_log_measure_the_same(windows: torch.Tensor) -> None:
    from tools.train_pair.measure import measure
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA / "models" / "drope", dtype=torch.float32)
    logged, lens = measure(model, windows[:3]), through_lens("drope", windows[:3])
    assert lens["loss"] == pytest.approx(logged["loss"], abs=1e-5)
    for name in ("sink", "bos_ratio", "entropy"):
        torch.testing.assert_close(torch.tensor(lens[name]), torch.tensor(logged[name]), atol=2e-4, rtol=0)


def test_results_and_cards_are_of_the_shipped_run() -> None:
    facts = json.loads((RESULTS / "pair.json").read_text())
    trunk = read_log(RESULTS / "trunk.jsonl")
    for twin in TWINS:
        rows = read_log(RESULTS / f"{twin}.jsonl")
        assert rows[0]["step"] == trunk[-1]["step"]
        assert rows[-1]["tokens"] == facts[twin]["trained_tokens"]
        assert f"| held-out loss, nats per token | {facts[twin]['loss']:.4f} |" in (
            DATA / "models" / twin / "README.md"
        ).read_text(encoding="utf-8")
    assert facts["rope"]["branch_tokens"] == facts["drope"]["branch_tokens"] == trunk[-1]["tokens"]


def test_the_page_lists_every_book_and_the_figures_it_shows() -> None:
    page = (ROOT / "docs" / "pair.md").read_text(encoding="utf-8")
    facts = json.loads((RESULTS / "pair.json").read_text())
    for book in (*facts["books"]["training"], *facts["books"]["held_out"]):
        assert book in page
    for image in re.findall(r"\]\((images/pair/[a-z]+\.png)\)", page):
        assert (ROOT / "docs" / image).is_file()
    assert f"{facts['rope']['loss']:.4f} | {facts['drope']['loss']:.4f}" in page
