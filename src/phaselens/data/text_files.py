"""Files of texts: lines, JSON, CSV and Parquet records, plain or compressed, read one record at a time."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from phaselens.data.text import TextFields
from phaselens.errors import InputError, close_matches

STDIN = "-"
_COMPRESSED = (".gz", ".zst")
_LINES, _JSON_LINES, _PARQUET = (".txt",), (".jsonl", ".ndjson"), (".parquet",)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FORMATS = (*_LINES, *_JSON_LINES, *_DELIMITERS, *_PARQUET)
#: What a file of texts can be, for messages.
FORMATS = "a .txt file (one text per line), a .jsonl, .csv, .tsv or .parquet file (.gz and .zst too)"


@dataclass(frozen=True)
class Record:
    """A line, or the fields of a record; `number` counts from 1 in its file, and `value` is None if it is empty."""

    location: str
    number: int
    value: str | Mapping[str, Any] | None


def is_text_file(path: Path) -> bool:
    """Return whether the name of `path` is one of a file that can be read."""
    return _kind(path)[0] in _FORMATS


def is_line_file(path: Path) -> bool:
    """Return whether the name of `path` is one of a file whose lines are texts."""
    return _kind(path)[0] in _LINES


def stem(path: Path) -> str:
    """Return the file's name without the suffixes of its format and compression."""
    return Path(path.stem).stem if path.suffix.lower() in _COMPRESSED else path.stem


def _kind(path: Path) -> tuple[str, str]:
    """Return the suffixes, in lower case, of the format and of the compression (empty without any)."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in _COMPRESSED else (suffix, "")


def read_records(path: Path, fields: TextFields) -> Iterator[Record]:
    """Yield the records of a regular file.

    Raises:
        InputError: naming the record that cannot be used.
    """
    kind, compression = _kind(path)
    name = f"texts file {str(path)!r}"
    if kind in _PARQUET and not compression:
        yield from _parquet_records(path, name, fields)
        return
    with _decompressed(path, compression, name) as file:
        if kind in _PARQUET:  # its columns are read at any place, so the whole file is needed
            yield from _parquet_records(io.BytesIO(file.read()), name, fields)
        elif kind in _LINES:
            yield from _line_records(_lines(file, name), name, fields)
        elif kind in _JSON_LINES:
            yield from _json_records(_lines(file, name), name)
        else:
            yield from _csv_records(file, name, _DELIMITERS[kind], fields)


def read_stdin(fields: TextFields) -> Iterator[Record]:
    """Yield the records of stdin: JSON objects if its first line begins with a brace, else lines or paragraphs."""
    name = "texts on stdin"
    lines = _lines(sys.stdin.buffer, name)
    first_lines: list[tuple[int, str]] = []
    while not first_lines or not first_lines[-1][1].strip():
        line = next(lines, None)
        if line is None:
            return
        first_lines.append(line)
    is_json = first_lines[-1][1].lstrip().startswith("{")
    every_line = chain(first_lines, lines)
    yield from _json_records(every_line, name) if is_json else _line_records(every_line, name, fields)


@contextmanager
def _decompressed(path: Path, compression: str, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; damage in its compression is an InputError."""
    with path.open("rb") as file:
        if not compression:
            yield file
            return
        try:
            with closing(_decompressor(file, compression)) as plain:
                yield plain
        except (EOFError, zlib.error, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name}: damaged or truncated {compression} data ({reason})") from error


def _decompressor(file: IO[bytes], compression: str) -> IO[bytes]:
    plain: Any
    if compression == ".gz":
        plain = gzip.GzipFile(fileobj=file)
    else:
        import pyarrow as pa

        plain = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
    stream: IO[bytes] = plain
    return stream


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) with the line's end; only a line feed ends a line."""
    for number, raw in enumerate(file, start=1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not valid UTF-8 at byte {error.start + 1} "
                f"({error.object[error.start]:#04x}); save the file as UTF-8"
            ) from error


def _line_records(lines: Iterator[tuple[int, str]], name: str, fields: TextFields) -> Iterator[Record]:
    """Yield each line, or each paragraph with its lines joined by line feeds, numbered by its first line."""
    if not fields.paragraphs:
        for number, line in lines:
            text = line.rstrip("\r\n")
            yield Record(f"{name}, line {number}", number, text if text.strip() else None)
        return
    paragraph: list[str] = []
    first = 1
    for number, line in lines:
        text = line.rstrip("\r\n")
        if text.strip():
            first = first if paragraph else number
            paragraph.append(text)
        elif paragraph:
            yield Record(f"{name}, line {first}", first, "\n".join(paragraph))
            paragraph = []
    if paragraph:
        yield Record(f"{name}, line {first}", first, "\n".join(paragraph))


def _json_records(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Record]:
    for number, line in lines:
        location = f"{name}, line {number}"
        if not line.strip():
            yield Record(location, number, None)
            continue
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at character {error.pos + 1}"
            raise InputError(
                f"{location}: not valid JSON ({problem}); put one object on each line"
            ) from error
        except RecursionError as error:
            raise InputError(
                f"{location}: JSON nested too deeply; expected an object on each line"
            ) from error
        except ValueError as error:  # a whole number of more digits than Python reads
            raise InputError(f"{location}: a number has too many digits; write it as text") from error
        if not isinstance(entry, dict):
            raise InputError(f"{location}: expected an object, received {type(entry).__name__}")
        yield Record(location, number, entry)


def _csv_records(file: IO[bytes], name: str, delimiter: str, fields: TextFields) -> Iterator[Record]:
    """Yield the rows below the header, numbered by the line on which each begins."""
    reader = csv.reader((line for _, line in _lines(file, name)), delimiter=delimiter, strict=True)
    with _long_fields():
        header = _next_row(reader, name)
    if header is None:
        return
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise InputError(f"{name}: two columns are called {repeated[0]!r}; give each its own name")
    _require_column(name, fields, header)
    while True:
        number = reader.line_num + 1
        with _long_fields():
            row = _next_row(reader, name)
        if row is None:
            return
        location = f"{name}, line {number}"
        if not any(cell.strip() for cell in row):
            yield Record(location, number, None)
            continue
        if len(row) != len(header):
            raise InputError(
                f"{location}: {len(row)} cells, but the header has {len(header)}; quote the text"
            )
        yield Record(location, number, dict(zip(header, row, strict=True)))


def _next_row(reader: Any, name: str) -> list[str] | None:
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not valid CSV ({error})") from error
    return row


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow cells of any length; the csv module's own limit, 128 kB, holds for the whole process."""
    earlier = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(earlier)


def _parquet_records(source: Path | IO[bytes], name: str, fields: TextFields) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: not a Parquet file ({' '.join(str(error).split())})") from error
    with file:
        names = file.schema_arrow.names
        _require_column(name, fields, names)
        columns = [column for column in fields.columns if column in names]
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{name}, row {number}", number, values)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{name}: damaged after row {number} ({' '.join(str(error).split())})"
            ) from error


def _require_column(name: str, fields: TextFields, names: list[str]) -> None:
    """Raise InputError unless the columns include those of the text and, if it is named, of the label."""
    for column, option in ((fields.text, "--text-field"), (fields.label, "--label-field")):
        if column is not None and column not in names:
            raise InputError(f"{name} has no column {column!r}; {close_matches(column, names)} ({option})")
