"""Books to token streams under a model's own tokenizer; batches and held-out windows from them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tools.recalibrate.recipe import Recipe
from tools.train_pair.corpus import books

Stream = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


def prepare(corpus: Path, cache: Path, held_out: tuple[str, ...], tokenizer: Any) -> None:
    """Write `train.bin`, `held_out.bin` and `books.json` under `cache`; a finished cache is kept.

    A stream holds the ids of all its books in a row, without special tokens, in the smallest unsigned type that holds
    the vocabulary. `books.json` is written last, so its presence says that the streams are complete.

    Raises:
        ValueError: for a cache of other books or of another tokenizer, or for a book that spells out the BOS token.
    """
    training, held = books(corpus, held_out)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = {
        "training": [path.stem for path in training],
        "held_out": [path.stem for path in held],
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "dtype": "uint16" if len(tokenizer) <= 1 << 16 else "uint32",
    }
    record = cache / "books.json"
    if record.exists():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        if {key: earlier[key] for key in facts} != facts:
            raise ValueError(
                f"{cache} was prepared from other books or another tokenizer; choose another --cache"
            )
        return
    cache.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, paths in (("train", training), ("held_out", held)):
        texts = [path.read_text(encoding="utf-8") for path in paths]
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        stream = np.concatenate([np.asarray(encoding.ids, dtype=facts["dtype"]) for encoding in encodings])
        if (stream == tokenizer.bos_token_id).any():
            raise ValueError(f"the {name} books spell out {tokenizer.bos_token!r}; remove it from them")
        stream.tofile(cache / f"{name}.bin")
        sizes[f"{name}_tokens"] = int(stream.size)
    partial = record.with_suffix(".tmp")
    partial.write_text(json.dumps(facts | sizes, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record)


def open_stream(cache: Path, name: str) -> Stream:
    """The stream `train` or `held_out`, [tokens], mapped from disk."""
    dtype = json.loads((cache / "books.json").read_text(encoding="utf-8"))["dtype"]
    return np.memmap(cache / f"{name}.bin", dtype=dtype, mode="r")


def batch(stream: Stream, recipe: Recipe, bos: int, step: int) -> Rows:
    """The batch of `step`, [sequences, length]: BOS and a random window of the books in each row.

    It depends on the stream, the seed and the step alone, so a resumed run and the twin see the same tokens.
    """
    rng = np.random.default_rng((recipe.seed, step))
    length = recipe.lengths[step % len(recipe.lengths)]
    starts = rng.integers(0, stream.size - length, size=recipe.batch_tokens // length)
    return _windows(stream, starts, length, bos)


def held_out_windows(stream: Stream, n_windows: int, length: int, bos: int) -> Rows:
    """`n_windows` evenly spaced windows, [n_windows, length], BOS first in each."""
    starts = np.linspace(0, stream.size - length, n_windows, dtype=np.int64)
    return _windows(stream, starts, length, bos)


def _windows(stream: Stream, starts: npt.NDArray[np.int64], length: int, bos: int) -> Rows:
    rows = np.full((len(starts), length), bos, dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[1:] = stream[start : start + length - 1]
    return rows
