"""Sizes that a checkpoint's JSON files declare, compared with what its weights hold, before anything is built.

A config of a few bytes can declare a model of any size, and its construction would take all memory, or never end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phaselens.errors import ModelError
from phaselens.lens.families import ROW_FIELDS, WIDTH_FIELDS

_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")
_PARTS = re.compile(
    r"(num|n)_(\w+_)?(heads?|experts?|groups|blocks)|\w+_(size|dim|rank)|n_embd|n_inner|d_model|d_ff"
)
#: Values that one stored number can hold: weights of two bits are packed into integers of 32.
_PACKED = 16
_LARGEST_FIELD = 1 << 40
#: Ids between those of tokens that a tokenizer may leave out.
_UNUSED_IDS = 1 << 17


def require_sizes(config: Mapping[str, Any], n_tensors: int, n_numbers: int, model_name: str) -> None:
    """Compare a config with the number of tensors and of values in the headers of its weight files.

    Raises:
        ModelError: for a field that declares more than the weights hold.
    """
    held = f"its weights hold {n_tensors:,} tensors of {n_numbers:,} numbers in all"
    for section in _sections(config):
        for name, value in section.items():
            if type(value) is not int:
                continue
            is_beyond = (
                value > _LARGEST_FIELD
                or (_LAYERS.fullmatch(name) is not None and value > n_tensors)
                or (_PARTS.fullmatch(name) is not None and value > n_numbers * _PACKED)
            )
            if is_beyond:
                raise ModelError(
                    f"model {model_name!r}: config.json declares {name} {_short(value)}, but {held}; take "
                    "both from one checkpoint"
                )
        width = next((section[name] for name in WIDTH_FIELDS if name in section), None)
        for name in ROW_FIELDS:
            value = section.get(name)
            if type(value) is int and type(width) is int and value * width > n_numbers * _PACKED:
                raise ModelError(
                    f"model {model_name!r}: config.json declares {name} {_short(value)} and a width of "
                    f"{_short(width)}, but {held}; take both from one checkpoint"
                )


def require_token_ids(folder: Path, model_name: str) -> None:
    """Raise ModelError for a tokenizer whose ids lie far beyond the number of its tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        added = content.get("added_tokens") or []
        ids = [entry["id"] for entry in added]
        ids += vocabulary.values() if isinstance(vocabulary, dict) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the library that reads it says what is wrong
    n_tokens = len(vocabulary) + len(added)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id <= 2 * n_tokens + _UNUSED_IDS:
            raise ModelError(
                f"model {model_name!r}: its tokenizer.json has the id {_short(token_id)}, but only {n_tokens:,} "
                "tokens; fetch or copy it again"
            )


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and the configs nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _short(value: object) -> str:
    if type(value) is not int:
        return type(value).__name__
    return f"{value:,}" if abs(value) < 10**18 else "of more than 18 digits"
