"""Books to token streams: the byte-level BPE, the training stream and the held-out windows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Tokens = npt.NDArray[np.uint16]

BOS, EOS, MARK = "<s>", "</s>", "<copy>"
SPECIAL = (BOS, EOS, MARK)
BOS_ID, EOS_ID, MARK_ID = 0, 1, 2

# Books that are never trained on, unless others are named.
HELD_OUT = ("dracula", "the-adventures-of-sherlock-holmes")


def books(corpus: Path, held_out: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Return the text files of `corpus`, sorted: those to train on, and those held out (named without suffix)."""
    paths = sorted(corpus.glob("*.txt"))
    training = [path for path in paths if path.stem not in held_out]
    held = [path for path in paths if path.stem in held_out]
    missing = sorted(set(held_out) - {path.stem for path in held})
    if missing or not training:
        raise ValueError(
            f"{corpus}: held-out books not found: {missing}; {len(training)} other .txt files to train on"
        )
    return training, held


def train_tokenizer(paths: list[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE whose encoder puts `<s>` first; ids 0, 1, 2 are `<s>`, `</s>` and the copy mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in paths], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[MARK],
        clean_up_tokenization_spaces=False,
    )


def _paragraphs(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from lines


def encode_books(tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> Tokens:
    """Return all books in a row, [tokens], without special tokens (a book that spells one out is refused)."""
    encoded: list[Tokens] = []
    backend = tokenizer.backend_tokenizer
    for path in paths:
        for encoding in backend.encode_batch(list(_paragraphs(path)), add_special_tokens=False):
            encoded.append(np.asarray(encoding.ids, dtype=np.uint16))
    stream = np.concatenate(encoded)
    if (stream < len(SPECIAL)).any():
        raise ValueError(
            f"the corpus spells out one of the special tokens {SPECIAL}; remove it from the books"
        )
    return stream


def prepare(corpus: Path, cache: Path, held_out: tuple[str, ...], vocab_size: int) -> None:
    """Write tokenizer, `train.bin`, `held_out.bin` and `books.json` under `cache`; a finished cache is kept.

    `books.json` is written last, so its presence means that the other files are complete.
    """
    training, held = books(corpus, held_out)
    facts = {
        "training": [path.stem for path in training],
        "held_out": [path.stem for path in held],
        "vocab_size": vocab_size,
    }
    if is_prepared(cache, facts, "another vocabulary"):
        return
    tokenizer = train_tokenizer(training, vocab_size)
    tokenizer.save_pretrained(str(cache / "tokenizer"))
    streams = {
        name: encode_books(tokenizer, paths) for name, paths in (("train", training), ("held_out", held))
    }
    write_streams(cache, streams, facts)


def is_prepared(cache: Path, facts: dict[str, Any], otherwise: str) -> bool:
    """Return whether a finished cache exists.

    Raises:
        ValueError: for a cache of other books, or of what `otherwise` names.
    """
    record = cache / "books.json"
    if not record.exists():
        return False
    earlier = json.loads(record.read_text(encoding="utf-8"))
    if {key: earlier.get(key) for key in facts} != facts:
        raise ValueError(f"{cache} was prepared from other books or {otherwise}; choose another --cache")
    return True


def write_streams(cache: Path, streams: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> None:
    """Write each stream, and then `books.json` with the facts and the streams' sizes."""
    cache.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, stream in streams.items():
        stream.tofile(cache / f"{name}.bin")
        sizes[f"{name}_tokens"] = int(stream.size)
    record = cache / "books.json"
    partial = record.with_suffix(".tmp")
    partial.write_text(json.dumps(facts | sizes, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record)


def open_stream(cache: Path, name: str) -> npt.NDArray[Any]:
    """Return a prepared stream, `train` or `held_out`, [tokens], mapped from disk."""
    record = json.loads((cache / "books.json").read_text(encoding="utf-8"))
    # The pair's own vocabulary always fits, so its record names no dtype.
    return np.memmap(cache / f"{name}.bin", dtype=record.get("dtype", "uint16"), mode="r")


def held_out_windows(
    stream: npt.NDArray[Any], n_windows: int, length: int, bos: int = BOS_ID
) -> npt.NDArray[np.int64]:
    """Return `n_windows` evenly spaced windows of plain text, [n_windows, length], BOS first in each."""
    starts = np.linspace(0, stream.size - length, n_windows, dtype=np.int64)
    return windows_at(stream, starts, length, bos)


def windows_at(
    stream: npt.NDArray[Any], starts: npt.NDArray[np.int64], length: int, bos: int
) -> npt.NDArray[np.int64]:
    """Return the windows of a stream that begin at `starts`, [window, length], BOS first in each."""
    rows = np.full((len(starts), length), bos, dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[1:] = stream[start : start + length - 1]
    return rows
