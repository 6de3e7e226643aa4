"""Read texts: the bundled ones, a file of lines, a file of JSON objects, or Python strings."""

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
    """A text, and its id in result tables."""

    id: str
    text: str

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            if not isinstance(getattr(self, name), str):
                raise InputError(
                    f"expected {name} of a Text as a str, received {short_form(getattr(self, name))}"
                )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole text in UTF-8, before any truncation."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_texts(source: str, limit: int | None = None) -> list[Text]:
    """Read the texts of `source`: `bundled`, a .txt file (one text per line) or a .jsonl file (one object with `text`
    and optionally `id` per line). Blank lines are skipped. Only the first `limit` texts are read.

    Raises:
        InputError: naming the line that cannot be used.
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
            f"texts {source!r}: expected `bundled`, a .txt file (one text per line) or a .jsonl file"
        )
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"texts file {source!r} {problem}; name a .txt or .jsonl file, or `bundled`")
    read_line = readers[path.suffix.lower()]
    try:
        with path.open("rb") as handle:
            texts = list(
                islice((read_line(path, number, line) for number, line in _lines(path, handle)), limit)
            )
    except OSError as error:
        raise InputError(f"texts file {source!r} cannot be read: {error.strerror}") from error
    if not texts:
        raise InputError(f"texts file {source!r} holds no text; put a text on each line")
    return _require_distinct_ids(texts, source)


def texts_from(source: str | Iterable[str | Text], limit: int | None = None) -> list[Text]:
    """Return texts from a name or path as for `read_texts`, or from strings and Texts.

    >>> [text.id for text in texts_from(["one text", Text("mine", "another")])]
    ['0', 'mine']
    """
    if limit is not None:
        require_whole("limit", limit, 1)
    if isinstance(source, str):
        return read_texts(source, limit)
    if isinstance(source, Mapping | bytes | Text) or not isinstance(source, Iterable):
        raise InputError(
            f"expected texts as `bundled`, a file's name, or a list of strings, received {short_form(source)}"
        )
    texts = []
    for index, entry in enumerate(islice(source, limit)):
        if not isinstance(entry, str | Text):
            raise InputError(
                f"expected text {index} as a string or a phaselens.data.Text, received {short_form(entry)}"
            )
        text = Text(str(index), entry) if isinstance(entry, str) else entry
        _require_unicode(text.text, f"text {index}")
        texts.append(text)
    if not texts:
        raise InputError("no texts were given; give at least one")
    return _require_distinct_ids(texts, "the list of texts")


def _lines(path: Path, handle: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that are not blank; only a line feed ends a line."""
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
    location = f"texts file {str(path)!r}, line {number}"
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
        raise InputError(f"{location}: not valid JSON ({problem}); put one object on each line") from error
    except RecursionError as error:
        raise InputError(f"{location}: JSON nested too deeply; expected an object with `text`") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
        raise InputError(f"{location}: expected an object with a non-empty `text`")
    name = entry.get("id", f"{path.stem}:{number}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"{location}: `id` is {name!r}; expected text or a whole number")
    _require_unicode(entry["text"], location)
    _require_unicode(str(name), location)
    return Text(str(name), entry["text"])


def _require_unicode(text: str, location: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON and Python can hold but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location}: symbol {error.start + 1} is a lone surrogate, not a character"
        ) from error


def _require_distinct_ids(texts: list[Text], source: str) -> list[Text]:
    """Return `texts`; raise InputError if two have the same id."""
    ids: set[str] = set()
    for text in texts:
        if text.id in ids:
            raise InputError(f"two texts in {source} have the id {text.id!r}; give each its own")
        ids.add(text.id)
    return texts
