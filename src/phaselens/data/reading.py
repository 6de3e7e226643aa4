"""Read texts: the bundled ones, files, folders and stdin, or Python strings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from phaselens.data.text import Text, TextFields
from phaselens.data.text_files import (
    FORMATS,
    STDIN,
    Record,
    is_line_file,
    is_text_file,
    read_records,
    read_stdin,
    stem,
)
from phaselens.errors import InputError, require_kind, require_unicode, require_whole, short_form

BUNDLED = "bundled"
_MAX_KEYS = 8
#: A line that is broken within a sentence has at least so many characters, and none of these ends.
_LONG_LINE = 40
_SENTENCE_ENDS = ".!?…:;。！？"
_CLOSING = "\"'”’»)]*_"


@dataclass(frozen=True)
class Corpus:
    """The texts of a run, and notes about what was left out."""

    texts: list[Text]
    notes: list[str] = field(default_factory=list)


def read_texts(source: str, limit: int | None = None, fields: TextFields | None = None) -> list[Text]:
    """Read the texts of `source`; see `read_corpus`, which also counts what was skipped."""
    return read_corpus(source, limit, fields).texts


def read_corpus(source: str, limit: int | None = None, fields: TextFields | None = None) -> Corpus:
    """Read the texts of `source`: `bundled`, a file, a folder of such files, or `-` for stdin.

    A .txt file holds one text per line; .jsonl, .csv, .tsv and .parquet files hold records. A file can be compressed
    (.gz, .zst). Of a folder, the files of these formats in it are read, in the order of their names; links out of it
    and folders inside it are not followed. Texts without an id are numbered by their lines: `FILE:LINE`. Blank lines
    and records whose text is empty are skipped, and counted in a note. Only the first `limit` texts are read.

    Raises:
        InputError: naming the line that cannot be used.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"texts: expected source as `bundled`, a file, a folder or `-`, received {short_form(source)}"
        )
    if limit is not None:
        require_whole("limit", limit, 1)
    fields = _checked_fields(fields)
    source = os.fspath(source)
    reader = _Reader(fields, limit)
    if not source:
        raise InputError("texts '': expected `bundled`, a file, a folder or `-`")
    if source == BUNDLED:
        bundled = Path(str(files("phaselens.data") / "texts" / "bundled.jsonl"))
        texts = list(_Reader(TextFields(), limit).texts_of(read_records(bundled, TextFields()), BUNDLED))
        return Corpus(texts)
    try:
        if source == STDIN:
            if sys.stdin is None:
                raise InputError("texts '-': stdin is closed; name a file")
            texts = list(reader.texts_of(read_stdin(fields), "stdin"))
        else:
            texts = list(_file_texts(source, fields, reader))
    except OSError as error:
        raise InputError(f"texts file {source!r} cannot be read: {error.strerror or error}") from error
    if not texts:
        skipped = f" ({reader.skipped})" if reader.n_empty else ""
        raise InputError(f"texts file {source!r} holds no text{skipped}; put a text on each line")
    return Corpus(_require_distinct_ids(texts, source), reader.notes(source))


def _checked_fields(fields: TextFields | None) -> TextFields:
    """Return `fields`, by default those of every format."""
    if fields is None:
        return TextFields()
    require_kind("fields", fields, TextFields, "such as TextFields(text='body')")
    return fields


@dataclass
class LineWrapping:
    """Counts lines of text files that end within a sentence, as those of a text broken into lines do.

    `n_followed` lines have another right below them, of which `n_open` are long and end without punctuation.
    """

    n_followed: int = 0
    n_open: int = 0
    _last: tuple[str, int, str] = ("", 0, "")

    def add(self, name: str, number: int, line: str) -> None:
        """Count the line before this one, if it is right above it in the same file."""
        last_name, last_number, last_line = self._last
        if last_name == name and last_number + 1 == number:
            self.n_followed += 1
            end = last_line.rstrip().rstrip(_CLOSING)
            self.n_open += len(end) >= _LONG_LINE and end[-1:] not in _SENTENCE_ENDS
        self._last = name, number, line

    @property
    def is_likely(self) -> bool:
        """Whether the lines look like those of texts broken into lines: half of them or more end within a sentence."""
        return self.n_open >= 2 and 2 * self.n_open >= self.n_followed


class _Reader:
    """Turns records into texts up to a limit, and counts those that are empty."""

    def __init__(self, fields: TextFields, limit: int | None) -> None:
        self.fields = fields
        self.n_left = sys.maxsize if limit is None else limit
        self.n_empty = 0
        self.wrapping = LineWrapping()
        self.left_out: list[str] = []

    @property
    def skipped(self) -> str:
        """A phrase that counts the empty records and lines."""
        noun = "line or record" if self.n_empty == 1 else "lines or records"
        return f"{self.n_empty:,} empty {noun}"

    def notes(self, source: str) -> list[str]:
        """Return one note for each kind of thing that was skipped."""
        notes = []
        if self.n_empty:
            notes.append(f"texts {source!r}: {self.skipped} skipped")
        if self.wrapping.is_likely:
            notes.append(
                f"texts {source!r}: each line is a text, and many lines end within a sentence; --paragraphs reads "
                "texts that are separated by blank lines"
            )
        if self.left_out:
            names = ", ".join(map(repr, self.left_out[:3]))
            more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
            notes.append(f"texts {source!r}: not read: {names}{more}")
        return notes

    def texts_of(self, records: Iterator[Record], name: str) -> Iterator[Text]:
        """Yield the texts of one file, whose unnamed texts are called `name:number`."""
        while self.n_left:
            record = next(records, None)
            if record is None:
                return
            text = self._text(record, name)
            if text is None:
                self.n_empty += 1
            else:
                self.n_left -= 1
                yield text

    def _text(self, record: Record, name: str) -> Text | None:
        """Return the record's text; None if it is empty."""
        default_id = f"{name}:{record.number}"
        if record.value is None:
            return None
        if isinstance(record.value, str):
            if self.fields.label is not None:
                raise InputError(
                    f"{record.location} is a line, which has no label; leave out --label-field, or give records "
                    "(.jsonl, .csv, .tsv, .parquet)"
                )
            if not self.fields.paragraphs:
                self.wrapping.add(name, record.number, record.value)
            return Text(default_id, record.value)
        fields, values = self.fields, record.value
        if fields.text not in values:
            raise InputError(f"{record.location} has no {fields.text!r}; {_name_keys(values)} (--text-field)")
        text = values[fields.text]
        if text is None or (isinstance(text, str) and not text.strip()):
            return None
        if not isinstance(text, str):
            raise InputError(f"{record.location}: {fields.text!r} is {short_form(text)}; expected text")
        require_unicode(record.location, text)
        return Text(self._id(record, values, default_id), text, self._label(record, values))

    def _id(self, record: Record, values: Mapping[str, Any], default: str) -> str:
        if self.fields.id not in values and self.fields.id != TextFields.id:
            raise InputError(
                f"{record.location} has no {self.fields.id!r}; {_name_keys(values)} (--id-field)"
            )
        value = values.get(self.fields.id)
        if value is None or value == "":
            return default
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(
                f"{record.location}: {self.fields.id!r} is {short_form(value)}; expected text or a whole number"
            )
        require_unicode(record.location, str(value))
        return str(value)

    def _label(self, record: Record, values: Mapping[str, Any]) -> str | None:
        name = self.fields.label
        if name is None:
            return None
        if name not in values:
            raise InputError(f"{record.location} has no {name!r}; {_name_keys(values)} (--label-field)")
        value = values[name]
        if isinstance(value, bool | int | str) and value != "":
            require_unicode(record.location, str(value))
            return str(value)
        raise InputError(f"{record.location}: {name!r} is {short_form(value)}; expected a label")


def _name_keys(values: Mapping[str, Any]) -> str:
    """Return a phrase that names the keys of a record."""
    keys = ", ".join(
        repr(short_form(key)) if len(key) > 40 else repr(key) for key in list(values)[:_MAX_KEYS]
    )
    more = f" and {len(values) - _MAX_KEYS} more" if len(values) > _MAX_KEYS else ""
    return f"its keys are {keys}{more}" if values else "it is empty"


def _file_texts(source: str, fields: TextFields, reader: _Reader) -> Iterator[Text]:
    """Yield the texts of a file or of a folder's files."""
    path = Path(source)
    if path.is_dir():
        yield from _folder_texts(path, fields, reader)
        return
    if not is_text_file(path):
        raise InputError(f"texts {source!r}: expected `bundled`, a folder, `-` or {FORMATS}")
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"texts file {source!r} {problem}; name a file, a folder, `-`, or `bundled`")
    if is_line_file(path) and (fields.text, fields.id) != (TextFields.text, TextFields.id):
        option = "--text-field" if fields.text != TextFields.text else "--id-field"
        raise InputError(
            f"texts file {source!r} has lines, not records, so that {option} has no effect; leave it out"
        )
    yield from reader.texts_of(read_records(path, fields), stem(path))


def _folder_texts(folder: Path, fields: TextFields, reader: _Reader) -> Iterator[Text]:
    root = folder.resolve()
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    regular = [path for path in paths if path.is_file() and path.resolve().is_relative_to(root)]
    readable = [path for path in regular if is_text_file(path)]
    reader.left_out = [path.name + ("/" if path.is_dir() else "") for path in paths if path not in readable]
    if not readable:
        raise InputError(f"texts {str(folder)!r}: the folder holds none of {FORMATS}")
    stems = list(map(stem, readable))
    for path, name in zip(readable, stems, strict=True):
        # Two files of one name, notes.txt and notes.jsonl, keep their suffixes.
        yield from reader.texts_of(read_records(path, fields), name if stems.count(name) == 1 else path.name)


def texts_from(source: str | Iterable[str | Text], limit: int | None = None) -> list[Text]:
    """Return texts from a name or path as for `read_corpus`, or from strings and Texts.

    >>> [text.id for text in texts_from(["one text", Text("mine", "another")])]
    ['0', 'mine']
    """
    return corpus_from(source, limit).texts


def corpus_from(
    source: str | Iterable[str | Text], limit: int | None = None, fields: TextFields | None = None
) -> Corpus:
    """Return texts as `texts_from` does, and notes about what was left out.

    Raises:
        InputError: for a source that is neither a path nor texts, for an entry that is no text, and without texts.
    """
    if limit is not None:
        require_whole("limit", limit, 1)
    fields = _checked_fields(fields)
    if isinstance(source, str):
        return read_corpus(source, limit, fields)
    if isinstance(source, Mapping | Set | bytes | Text) or not isinstance(source, Iterable):
        raise InputError(
            f"expected texts as `bundled`, a file's name, or a list of strings, received {short_form(source)}"
        )
    texts = []
    for index, entry in enumerate(islice(source, limit)):
        if not isinstance(entry, str | Text):
            raise InputError(
                f"expected text {index} as a string or a phaselens.data.Text, received {short_form(entry)}"
            )
        if isinstance(entry, str):
            require_unicode(f"text {index}", entry)
        texts.append(Text(str(index), entry) if isinstance(entry, str) else entry)
    if not texts:
        raise InputError("no texts were given; give at least one")
    return Corpus(_require_distinct_ids(texts, "the list of texts"))


def _quoted(text: str) -> str:
    """Return the `repr` of a text, without its end if it is long."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def _require_distinct_ids(texts: list[Text], source: str) -> list[Text]:
    """Return `texts`; raise InputError if two have the same id."""
    ids: set[str] = set()
    for text in texts:
        if text.id in ids:
            raise InputError(f"two texts in {source} have the id {_quoted(text.id)}; give each its own")
        ids.add(text.id)
    return texts
