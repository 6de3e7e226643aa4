"""A word tokenizer and small checkpoints with random weights; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = tuple("abcdefghijklmnopqrstuvwxyz")


def toy_tokenizer(*, bos: bool = True, adds_bos: bool = True) -> Any:
    """A tokenizer of single letters (ids 3…28) in the 67 ids of the tiny models: `<s>` 0, `</s>` 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos and adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **special)


def toy_lens(family: str = "llama", *, label: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A lens of a tiny random model, with the toy tokenizer for texts."""
    import phaselens
    from phaselens.testing import tiny_model

    lens = phaselens.load(tiny_model(family, seed=seed, **overrides), label=label or family, check=False)
    lens.text_tokenizer = toy_tokenizer()
    return lens


def letters(n: int, start: int = 0) -> str:
    """A text of `n` one-letter words."""
    return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(n))


def save_checkpoint(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model and the toy tokenizer into a folder for `phaselens run FOLDER`."""
    from phaselens.testing import tiny_model

    tiny_model(family, seed=seed, **overrides).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def save_in_hub_cache(cache: Path, name: str, family: str = "llama", **overrides: Any) -> Path:
    """Save a checkpoint as a hub repository cached under `cache` (HF_HUB_CACHE); return the folder of its revision."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return save_checkpoint(repository / "snapshots" / commit, family, **overrides)


def toy_info(*, n_layers: int = 2, n_heads: int = 2, window: int | None = None, label: str = "toy") -> Any:
    """A ModelInfo without a model, for metrics that a test feeds directly."""
    from phaselens.testing import model_info

    return model_info(
        n_layers=n_layers,
        n_heads=n_heads,
        positions="nope",
        windows=(window,) * n_layers,
        label=label,
        source=label,
    )
