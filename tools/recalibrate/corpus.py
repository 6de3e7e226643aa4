"""Books to token streams under a model's own tokenizer; batches and held-out windows from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tools.recalibrate.recipe import RecalibrationRecipe
from tools.train_pair.corpus import (
    books,
    held_out_windows,
    is_prepared,
    open_stream,
    windows_at,
    write_streams,
)

__all__ = ["batch", "held_out_windows", "open_stream", "prepare"]

Stream = npt.NDArray[Any]
TokenRows = npt.NDArray[np.int64]


def prepare(corpus: Path, cache: Path, held_out: tuple[str, ...], tokenizer: Any) -> None:
    """Write `train.bin`, `held_out.bin` and `books.json` under `cache`; a finished cache is kept.

    A stream holds the ids of all its books in a row, without special tokens, in the smallest unsigned type that holds
    the vocabulary. `books.json` is written last, so its presence means that the streams are complete.

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
    if is_prepared(cache, facts, "another tokenizer"):
        return
    streams = {}
    for name, paths in (("train", training), ("held_out", held)):
        texts = [path.read_text(encoding="utf-8") for path in paths]
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        stream = np.concatenate([np.asarray(encoding.ids, dtype=facts["dtype"]) for encoding in encodings])
        if (stream == tokenizer.bos_token_id).any():
            raise ValueError(f"the {name} books contain {tokenizer.bos_token!r}; remove it from them")
        streams[name] = stream
    write_streams(cache, streams, facts)


def batch(stream: Stream, recipe: RecalibrationRecipe, bos: int, step: int) -> TokenRows:
    """Return the batch of `step`, [sequences, length]: BOS and a random window of the books in each row.

    It depends on the stream, the seed and the step alone, so a resumed run and the twin see the same tokens.
    """
    rng = np.random.default_rng((recipe.seed, step))
    length = recipe.lengths[step % len(recipe.lengths)]
    starts = rng.integers(0, stream.size - length, size=recipe.batch_tokens // length)
    return windows_at(stream, starts, length, bos)
