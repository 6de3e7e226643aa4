"""A random Llama, books made up here, and recalibrations of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools.recalibrate import corpus, network
from tools.recalibrate.recipe import RecalibrationRecipe
from tools.recalibrate.train import Recalibration
from tools.train_pair.corpus import train_tokenizer

from tests.tools.books import write_books
from tests.tools.recalibration import BOS, OFTEN, TINY


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "ship", "sailed", "north", "and", "a", "grey", "sea", "rose", "to", "meet", "her"]
    return write_books(tmp_path_factory.mktemp("books"), words, n_lines=100)


@pytest.fixture(scope="module")
def checkpoint(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer, as a checkpoint folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(sorted(books.glob("*.txt")), 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(books: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    corpus.prepare(books, folder, ("kept",), network.load(str(checkpoint))[1])
    return folder


@pytest.fixture
def start(checkpoint: Path, cache: Path) -> Any:
    """A function that starts or resumes a run of a recipe in a folder."""

    def start(folder: Path, recipe: RecalibrationRecipe = TINY, **options: Any) -> Recalibration:
        model, _ = network.load(str(checkpoint))
        return Recalibration(model, BOS, recipe, folder, cache, OFTEN, **options)

    return start
