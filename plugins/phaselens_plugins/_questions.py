"""Questions with options, from a JSONL file: an object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.plugin import InputError

CONTEXTUAL, PARAMETRIC = "contextual", "parametric"
KINDS = (CONTEXTUAL, PARAMETRIC)
FORMAT = '{"id": …, "kind": "parametric", "prompt": …, "options": [" Yes", " No"], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """One item. `answer` is the place of the right option. `context` stands before the prompt, on lines of its own."""

    id: str
    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    context: str = ""

    @property
    def asked(self) -> str:
        """Context and prompt, without the white space at the end, which belongs to the options."""
        return self._whole.rstrip()

    def continuation(self, option: int) -> str:
        """What follows `asked`: the white space that the prompt ends with, or else one space, and the option."""
        gap = self._whole[len(self.asked) :] or " "
        return gap + self.options[option]

    @property
    def _whole(self) -> str:
        return f"{self.context.rstrip()}\n\n{self.prompt}" if self.context.strip() else self.prompt


@dataclass(frozen=True)
class Questions:
    """The items of a file, and the file's sha256."""

    items: tuple[Question, ...]
    sha256: str


def read_questions(file: str) -> Questions:
    """The items of a JSONL file.

    Raises:
        InputError: in one line, with the number of the line that cannot be used.
    """
    path = Path(file)
    if not path.is_file():
        found = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"file {file!r} {found}; name a JSONL file of questions: {FORMAT}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"file {file!r} cannot be read: {error.strerror}") from error
    items: dict[str, Question] = {}
    for number, line in _lines(file, raw):
        item = _question(f"file {file!r}, line {number}", number, line)
        if item.id in items:
            raise InputError(
                f"file {file!r}, line {number}: the id {item.id!r} stood there before; give each its own"
            )
        items[item.id] = item
    if not items:
        raise InputError(f"file {file!r} holds no question; put one on each line: {FORMAT}")
    return Questions(tuple(items.values()), hashlib.sha256(raw).hexdigest())


def _lines(file: str, raw: bytes) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; only a line feed ends a line."""
    for number, piece in enumerate(raw.split(b"\n"), start=1):
        try:
            line = piece.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"file {file!r}, line {number}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8"
            ) from error
        if line:
            yield number, line


def _question(where: str, number: int, line: str) -> Question:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply; expected an object: {FORMAT}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object: {FORMAT}")
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name):
        raise InputError(f"{where}: `id` is {name!r}; expected text or a whole number")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise InputError(f"{where}: `kind` is {kind!r}; expected contextual or parametric")
    options = _options(where, entry)
    answer = entry.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise InputError(
            f"{where}: `answer` is {answer!r}; expected the right option's place, 0 to {len(options) - 1}"
        )
    prompt = _text(where, entry, "prompt")
    context = _text(where, entry, "context") if entry.get("context") is not None else ""
    return Question(_unicode(where, "id", str(name)), str(kind), prompt, options, answer, context)


def _options(where: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    given = entry.get("options")
    if not isinstance(given, list) or len(given) < 2:
        raise InputError(f"{where}: `options` is {given!r}; expected a list of two or more texts")
    for one in given:
        if not isinstance(one, str) or not one.strip():
            raise InputError(f"{where}: option {one!r}; expected a text that is not blank")
    options = tuple(_unicode(where, "options", one.strip()) for one in given)
    if len(set(options)) < len(options):
        raise InputError(f"{where}: two options say the same; found {given!r}")
    return options


def _text(where: str, entry: Mapping[str, Any], name: str) -> str:
    given = entry.get(name)
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{where}: `{name}` is {given!r}; expected a text that is not blank")
    return _unicode(where, name, given)


def _unicode(where: str, name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: `{name}` has a lone surrogate at symbol {error.start + 1}, no character"
        ) from error
    return text
