"""Texts are read line by line, and a line that cannot be used is named."""

import hashlib
import os
from pathlib import Path

import pytest

from phaselens.data import Text, read_texts, texts_from
from phaselens.errors import InputError


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_text_file_holds_one_text_per_line(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.txt", "first\r\n\n  \n third one \u2028 with a separator\nlast")
    assert read_texts(path) == [
        Text("mine:1", "first"),
        Text("mine:4", " third one \u2028 with a separator"),
        Text("mine:5", "last"),
    ]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, "a.txt", "\ufeffword"))[0].text == "word"


def test_a_json_file_holds_one_object_per_line_with_optional_id(tmp_path: Path) -> None:
    path = write(
        tmp_path, "mine.jsonl", '{"text": "a", "id": "x"}\n\n{"text": "b", "more": 1}\n{"id": 7, "text": "c"}'
    )
    assert read_texts(path) == [Text("x", "a"), Text("mine:3", "b"), Text("7", "c")]


def test_only_the_requested_number_of_texts_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.txt", b"one\ntwo\n\xff never reached\n")
    assert [text.text for text in read_texts(path, limit=2)] == ["one", "two"]


def test_the_hash_is_of_the_whole_text() -> None:
    assert Text("a", "naïve").sha256 == hashlib.sha256("naïve".encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff\n", r"line 2: not valid UTF-8 at byte 5 \(0xff\); save the file as UTF-8"),
        ("a.txt", b"\n \n", "holds no text .2 empty lines or records.; put a text on each line"),
        ("a.txt", b"", "holds no text"),
        ("a.doc", b"a", "expected `bundled`, a folder, `-` or a .txt file"),
        ("a.parquet.gz", b"a", "damaged or truncated .gz data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not valid JSON .*; put one object on each line"),
        ("a.jsonl", b"[1, 2]", "line 1: expected an object, received list"),
        ("a.jsonl", b'{"txt": "a", "n": 1}', "line 1 has no 'text'; its keys are 'txt', 'n' .--text-field"),
        ("a.jsonl", b"{}", "line 1 has no 'text'; it is empty"),
        ("a.jsonl", b'{"text": " "}', r"holds no text .1 empty line or record."),
        ("a.jsonl", b'{"text": 3}', "line 1: 'text' is 3; expected text"),
        ("a.jsonl", b'{"text": "a", "id": [1]}', r"line 1: 'id' is \[1\]; expected text or a whole number"),
        ("a.jsonl", b'{"text": "a", "id": true}', r"line 1: 'id' is True"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: a number has too many digits"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "line 1: symbol 2 is a lone surrogate"),
        ("a.jsonl", b'{"text":"a","id":1}\n{"text":"b","id":"1"}', "two texts in .* have the id '1'"),
        ("a.jsonl", b"[" * 100_000, "line 1: JSON nested too deeply"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_texts(write(tmp_path, name, content))


def test_a_missing_file_an_empty_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; name a file, a folder, `-`, or `bundled`"):
        read_texts(str(tmp_path / "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"the folder holds none of a \.txt file"):
        read_texts(str(tmp_path / "folder.txt"))
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would never return
    with pytest.raises(InputError, match="is not a regular file"):
        read_texts(str(tmp_path / "pipe.txt"))


def test_a_file_without_read_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "mine.txt", "a")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read_texts(path)


def test_python_strings_are_numbered_and_texts_keep_their_ids() -> None:
    assert texts_from(["a", Text("mine", "b"), "c"], limit=2) == [Text("0", "a"), Text("mine", "b")]
    assert texts_from(iter(["a"])) == [Text("0", "a")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no texts were given"),
        ([1], "expected text 0 as a string or a phaselens.data.Text, received 1"),
        (["\ud800"], "text 0: symbol 1 is a lone"),
    ],
)
def test_python_values_that_are_not_texts_are_refused(values: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts_from(values)  # type: ignore[arg-type]


def test_the_bundled_texts_are_present_and_distinct() -> None:
    texts = read_texts("bundled")
    assert len(texts) >= 20
    assert len({text.sha256 for text in texts}) == len(texts)
