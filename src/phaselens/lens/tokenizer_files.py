"""Tokenizers of checkpoints; a damaged one is an error of one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phaselens.errors import ModelError, is_number
from phaselens.lens import gguf_files, headers
from phaselens.lens.declared_sizes import require_token_ids
from phaselens.lens.model_source import ModelSource
from phaselens.lens.pretrained import one_line

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(tokenizer: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder or hub id.

    Raises:
        ModelError: where it cannot be loaded.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else None
    if folder is not None:
        headers.require_own_files(folder, tokenizer)
    try:
        return _load(tokenizer, revision)
    except BaseException as error:
        if not _is_damage(error):
            raise
        raise ModelError(
            f"tokenizer {tokenizer!r} could not be loaded: {_described(error, folder)}"
        ) from error


def load_own_tokenizer(source: ModelSource) -> tuple[Any, str | None]:
    """Return the checkpoint's tokenizer and None, or None and the reason why there is none."""
    folder = source.folder
    if folder is not None and not headers.has_tokenizer(folder):
        return None, f"{source.location} holds no tokenizer files; name one with tokenizer=…"
    if folder is not None:
        require_token_ids(folder, source.name)
    try:
        if source.gguf is not None:
            return gguf_files.load_tokenizer(source.gguf), None
        return _load(source.location, source.base.revision), None
    except BaseException as error:
        if not _is_damage(error):
            raise
        return None, f"no tokenizer could be loaded from {source.location}: {_described(error, folder)}"


def _load(location: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    if not is_number(tokenizer.model_max_length):
        raise ValueError(f"{_CONFIG} has a model_max_length that is not a number")
    return tokenizer


def _is_damage(error: BaseException) -> bool:
    """Return whether a tokenizer's files raised it: the library tokenizers raises plain exceptions, or panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _described(error: BaseException, folder: Path | None) -> str:
    """Return an error in one line, with the file that raises it."""
    message = one_line(error)
    file = None if folder is None else _damaged_file(folder)
    return message if file is None or message.startswith(file) else f"{file} cannot be used: {message}"


def _damaged_file(folder: Path) -> str | None:
    """Return the name of the file that the library tokenizers, or else transformers, cannot use."""
    from tokenizers import Tokenizer

    if (folder / _FILE).is_file():
        try:
            Tokenizer.from_file(str(folder / _FILE))
        except BaseException as error:
            if not _is_damage(error):
                raise
            return _FILE
    return _CONFIG if (folder / _CONFIG).is_file() else None
