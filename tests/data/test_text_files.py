"""Texts in the formats that people have: tables, compressed files, folders, stdin; labels and paragraphs."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaselens.data import Text, TextFields, corpus_from, read_corpus, read_texts
from phaselens.errors import InputError

RECORDS = [
    {"body": "first text", "name": "a", "kind": "prose"},
    {"body": "second, with a comma\nand a line", "name": "b", "kind": "verse"},
    {"body": "", "name": "c", "kind": "prose"},
    {"body": "fourth", "name": "d", "kind": "prose"},
]
FIELDS = TextFields(text="body", id="name", label="kind")
EXPECTED = [Text(r["name"], r["body"], r["kind"]) for r in RECORDS if r["body"]]


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def as_file(folder: Path, name: str, records: list[dict[str, Any]]) -> str:
    """Write records in the format that the name's suffix says."""
    path = folder / name
    if ".parquet" in path.suffixes:
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), table)
        path.write_bytes(compress(table.getvalue(), path.suffix))
        return str(path)
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    if kind in (".jsonl", ".ndjson"):
        content = "".join(json.dumps(record) + "\n" for record in records)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(records[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
        content = buffer.getvalue()
    path.write_bytes(compress(content.encode(), path.suffix))
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "t.jsonl",
        "t.ndjson",
        "t.csv",
        "t.tsv",
        "t.parquet",
        "t.parquet.gz",
        "t.parquet.zst",
        "t.jsonl.gz",
        "t.csv.gz",
        "t.JSONL.zst",
        "t.tsv.zst",
    ],
)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    source = as_file(tmp_path, name.lower(), RECORDS)
    if name != name.lower():
        source = str(Path(source).rename(tmp_path / "t.jsonl.ZST"))
    corpus = read_corpus(source, fields=FIELDS)
    assert corpus.texts == EXPECTED
    assert corpus.notes == [f"texts {source!r}: 1 empty line or record skipped"]
    assert read_corpus(source, limit=2, fields=FIELDS).texts == EXPECTED[:2]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("t.jsonl", [1, 2, 4]), ("t.parquet", [1, 2, 4]), ("t.csv", [2, 3, 6]), ("t.tsv.gz", [2, 3, 6])],
)
def test_texts_without_an_id_are_numbered_by_line_or_row(
    tmp_path: Path, name: str, numbers: list[int]
) -> None:
    records = [{"text": r["body"]} for r in RECORDS]
    assert [text.id for text in read_texts(as_file(tmp_path, name, records))] == [f"t:{n}" for n in numbers]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_can_be_compressed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("\ufeffone\r\n\nthrée".encode(), suffix))
    corpus = read_corpus(str(tmp_path / f"a.txt{suffix}"))
    assert corpus.texts == [Text("a:1", "one"), Text("a:3", "thrée")]
    assert corpus.notes == [f"texts {str(tmp_path / f'a.txt{suffix}')!r}: 1 empty line or record skipped"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed", "followed by junk"])
def test_damaged_compression_is_one_message(tmp_path: Path, suffix: str, damage: str) -> None:
    content = compress("".join(f"line {n}\n" for n in range(9000)).encode(), suffix)
    damaged = {
        "truncated": content[: len(content) // 2],
        "not compressed": b"plain text\n",
        "followed by junk": content + b"junk junk junk",
    }[damage]
    (tmp_path / f"a.txt{suffix}").write_bytes(damaged)
    with pytest.raises(InputError, match=rf"damaged or truncated \{suffix} data"):
        read_texts(str(tmp_path / f"a.txt{suffix}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id\na,1\nb\n", "line 3: 1 cells, but the header has 2; quote the text"),
        ("text,id\na, b,1\n", "line 2: 3 cells, but the header has 2"),
        ("text,text\na,b\n", "two columns are called 'text'"),
        ("txt,id\na,b\n", r"has no column 'text'; did you mean txt\? .--text-field"),
        ('text\n"open\n', "not valid CSV"),
        ("", "holds no text"),
        ("text\n", "holds no text"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_texts(str(tmp_path / "a.csv"))


def test_a_cell_can_be_longer_than_the_csv_modules_limit_which_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "word " * 100_000
    source = as_file(tmp_path, "a.csv", [{"text": long}])
    assert read_texts(source)[0].text == long
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            TextFields(text="boby"),
            r"'boby'.*did you mean body\?|has no 'boby'; its keys are 'body', 'name', 'kind'",
        ),
        (
            TextFields(text="body", id="ident"),
            "has no 'ident'; its keys are 'body', 'name', 'kind' .--id-field",
        ),
        (TextFields(text="body", label="kin"), r"'kin'.*--label-field"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_a_field_that_records_lack_is_refused_with_those_they_have(
    tmp_path: Path, name: str, fields: TextFields, message: str
) -> None:
    if name == "t.parquet" and fields.id == "ident":
        message = "has no 'ident'"
    with pytest.raises(InputError, match=message):
        read_texts(as_file(tmp_path, name, RECORDS), fields=fields)


def test_a_record_of_many_keys_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"k{n}": n for n in range(50)} | {"x" * 500: 1}))
    with pytest.raises(InputError, match=r"its keys are 'k0', .*'k7' and 43 more") as caught:
        read_texts(str(tmp_path / "a.jsonl"))
    assert len(str(caught.value)) < 400


def test_files_that_are_not_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_texts(str(tmp_path / "a.parquet"))
    source = Path(as_file(tmp_path, "b.parquet", [{"text": f"text {n} " * 50} for n in range(5000)]))
    content = bytearray(source.read_bytes())
    content[100:400] = bytes(300)
    source.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged after row|not a Parquet file"):
        read_texts(str(source))


def test_missing_cells_of_a_table(tmp_path: Path) -> None:
    table = [{"text": "a", "id": None}, {"text": None, "id": 2}, {"text": "c", "id": 3}]
    assert read_texts(as_file(tmp_path, "a.parquet", table)) == [Text("a:1", "a"), Text("3", "c")]
    with pytest.raises(InputError, match="row 1: 'id' is None; expected a label"):
        read_texts(as_file(tmp_path, "a.parquet", table), fields=TextFields(label="id"))


# Folders


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\nfour\n")
    as_file(tmp_path, "a.jsonl.gz", [{"text": "one"}, {"text": "two", "id": "mine"}])
    (tmp_path / "sub" / "c.txt").write_text("five")
    (tmp_path / "notes.md").write_text("not a text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    corpus = read_corpus(str(tmp_path))
    assert [(text.id, text.text) for text in corpus.texts] == [
        ("a:1", "one"),
        ("mine", "two"),
        ("b:1", "three"),
        ("b:2", "four"),
    ]
    assert corpus.notes == [f"texts {str(tmp_path)!r}: not read: 'notes.md', 'sub/'"]
    assert [text.text for text in read_texts(str(tmp_path), limit=3)] == ["one", "two", "three"]


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "inside.txt").write_text("fine")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "near.txt").symlink_to(folder / "inside.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "file.txt").write_text("not read")
    assert [text.id for text in read_texts(str(folder))] == ["inside:1", "near:1"]


def test_files_of_one_name_and_two_formats_are_told_apart_by_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("three")
    as_file(tmp_path, "a.jsonl", [{"text": "two"}])
    assert [text.id for text in read_texts(str(tmp_path))] == ["a.jsonl:1", "a.txt:1", "b:1"]


WRAPPED = (
    "Call me Ishmael. Some years ago--never mind how long precisely--having\n"
    "little or no money in my purse, and nothing particular to interest me on\n"
    "shore, I thought I would sail about a little.\n\nIt is a way I have.\n"
)


def test_lines_that_end_within_a_sentence_get_a_note(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(WRAPPED)
    corpus = read_corpus(str(path))
    assert len(corpus.texts) == 4
    assert "each line is a text, and many lines end within a sentence; --paragraphs" in corpus.notes[-1]
    by_paragraph = read_corpus(str(path), fields=TextFields(paragraphs=True))
    assert len(by_paragraph.texts) == 2
    assert by_paragraph.notes == []
    path.write_text("Whole sentences, one in each line, are texts of their own.\n" * 4 + "a title\nanother\n")
    assert read_corpus(str(path)).notes == []


# Stdin


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\ntwo\n", [("stdin:1", "one"), ("stdin:2", "two")]),
        (b'\n{"text": "one", "id": "x"}\n{"text": "two"}\n', [("x", "one"), ("stdin:3", "two")]),
        ('\ufeff{"text": "é"}'.encode(), [("stdin:1", "é")]),
    ],
)
def test_stdin_holds_lines_or_objects(
    monkeypatch: pytest.MonkeyPatch, content: bytes, texts: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert [(text.id, text.text) for text in read_texts("-")] == texts


def test_an_empty_or_closed_stdin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"\n\n"))
    with pytest.raises(InputError, match="holds no text"):
        read_texts("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="stdin is closed; name a file"):
        read_texts("-")


# Paragraphs


def test_paragraphs_end_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n \n\nthree\r\nfour")
    corpus = read_corpus(str(tmp_path / "a.txt"), fields=TextFields(paragraphs=True))
    assert corpus.texts == [Text("a:3", "one\ntwo"), Text("a:7", "three\nfour")]
    assert corpus.notes == []


@given(st.lists(st.text(alphabet="ab \t", max_size=4), max_size=12))
def test_paragraphs_hold_every_line_that_is_not_blank(lines: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Stdin("\n".join(["start", *lines]).encode()))
        texts = read_texts("-", fields=TextFields(paragraphs=True))
    written = [line for text in texts for line in text.text.split("\n")]
    assert written == [line for line in ["start", *lines] if line.strip()]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            TextFields(label="kind"),
            "notes.txt', line 1 is a line, which has no label; leave out --label-field",
        ),
        (TextFields(text="body"), "notes.txt' has lines, not records, so that --text-field has no effect"),
        (TextFields(id="name"), "notes.txt' has lines, not records, so that --id-field has no effect"),
    ],
)
def test_fields_of_records_are_refused_for_lines(tmp_path: Path, fields: TextFields, expected: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(expected)):
        read_texts(str(file), fields=fields)


def test_a_folder_may_hold_lines_beside_records_with_named_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "two", "kind": "x"}\n', encoding="utf-8")
    texts = read_texts(str(tmp_path), fields=TextFields(text="body"))
    assert [text.text for text in texts] == ["one", "two"]
    with pytest.raises(InputError, match="line 1 is a line, which has no label"):
        read_texts(str(tmp_path), fields=TextFields(text="body", label="kind"))


def test_python_texts_can_have_labels() -> None:
    corpus = corpus_from([Text("a", "one", "prose"), "two"])
    assert [text.label for text in corpus.texts] == ["prose", None]
    with pytest.raises(InputError, match="expected label of a Text as text, received 3"):
        Text("a", "one", 3)  # type: ignore[arg-type]
