"""Texts to measure on: the bundled ones, a file of lines, a file of JSON objects, or Python strings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import IO, Any

from phaselens.errors import InputError, require_whole, short_form

BUNDLED = "bundled"


@dataclass(frozen=True)
class Text:
    """A text and the name that result tables call it by."""

    id: str
    text: str

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            if not isinstance(getattr(self, name), str):
                raise InputError(
                    f"a Text's {name} is of type {type(getattr(self, name)).__name__}; give a str"
                )

    @cached_property
    def sha256(self) -> str:
        """Of the whole text in UTF-8, before any truncation."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_texts(source: str, limit: int | None = None) -> list[Text]:
    """The texts that `source` names: `bundled`, a .txt file (a text a line) or a .jsonl file (an object
    with `text` and optionally `id` a line). Blank lines are skipped. Only the first `limit` are read.
    InputError says which line cannot be used.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"texts: expected source as `bundled` or the name of a .txt or .jsonl file, received {short_form(source)}"
        )
    if limit is not None:
        require_whole("limit", limit, 1)
    if source == BUNDLED:
        path = Path(str(files("phaselens.data") / "texts" / "bundled.jsonl"))
    else:
        path = Path(source)
    readers = {".txt": _from_line, ".jsonl": _from_json}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"texts {source!r}: expected `bundled`, a .txt file (a text a line) or a .jsonl file"
        )
    if not path.is_file():
        found = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"texts file {source!r} {found}; name a .txt or .jsonl file, or `bundled`")
    read = readers[path.suffix.lower()]
    try:
        with path.open("rb") as handle:
            texts = list(islice((read(path, number, line) for number, line in _lines(path, handle)), limit))
    except OSError as error:
        raise InputError(f"texts file {source!r} cannot be read: {error.strerror}") from error
    if not texts:
        raise InputError(f"texts file {source!r} holds no text; put a text on each line")
    return _distinct(texts, source)


def texts_from(given: str | Iterable[str | Text], limit: int | None = None) -> list[Text]:
    """Texts from what a caller gave: a name or path as for `read_texts`, or strings and Texts.

    >>> [text.id for text in texts_from(["one text", Text("mine", "another")])]
    ['0', 'mine']
    """
    if limit is not None:
        require_whole("limit", limit, 1)
    if isinstance(given, str):
        return read_texts(given, limit)
    if isinstance(given, Mapping | bytes | Text) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise InputError(f"texts: got {kind}; give `bundled`, a file's name, or a list of strings")
    texts = []
    for place, each in enumerate(islice(given, limit)):
        if not isinstance(each, str | Text):
            kind = type(each).__name__
            raise InputError(f"text {place} is of type {kind}; give strings or phaselens.data.Text")
        text = Text(str(place), each) if isinstance(each, str) else each
        _require_unicode(text.text, f"text {place}")
        texts.append(text)
    if not texts:
        raise InputError("no texts were given; give at least one")
    return _distinct(texts, "the list of texts")


def _lines(path: Path, handle: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; only a line feed ends a line."""
    for number, raw in enumerate(handle, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"texts file {str(path)!r}, line {number}: not valid UTF-8 at byte {error.start + 1} "
                f"({error.object[error.start]:#04x}); save the file as UTF-8"
            ) from error
        if line.strip():
            yield number, line


def _from_line(path: Path, number: int, line: str) -> Text:
    return Text(f"{path.stem}:{number}", line)


def _from_json(path: Path, number: int, line: str) -> Text:
    where = f"texts file {str(path)!r}, line {number}"
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}"
        raise InputError(f"{where}: not valid JSON ({found}); put one object on each line") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply; expected an object with `text`") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
        raise InputError(f"{where}: expected an object with a non-empty `text`")
    name = entry.get("id", f"{path.stem}:{number}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"{where}: `id` is {name!r}; expected text or a whole number")
    _require_unicode(entry["text"], where)
    _require_unicode(str(name), where)
    return Text(str(name), entry["text"])


def _require_unicode(text: str, where: str) -> None:
    """JSON and Python can hold half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: symbol {error.start + 1} is a lone surrogate, no character") from error


def _distinct(texts: list[Text], source: str) -> list[Text]:
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise InputError(f"two texts in {source} have the id {text.id!r}; give each its own")
        seen.add(text.id)
    return texts
