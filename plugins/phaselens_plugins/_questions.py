"""Questions with options, read from a JSONL file with one object per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phaselens.plugin import InputError

CONTEXTUAL, PARAMETRIC = "contextual", "parametric"
KINDS = (CONTEXTUAL, PARAMETRIC)
FORMAT = '{"id": …, "kind": "parametric", "prompt": …, "options": [" Yes", " No"], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """One item. `answer` is the index of the right option. `context` precedes the prompt, on separate lines."""

    id: str
    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    context: str = ""

    @property
    def stem(self) -> str:
        """Context and prompt, without the white space at the end, which belongs to the options."""
        return self._full_prompt.rstrip()

    def continuation(self, option: int) -> str:
        """Return the text after `stem`: the white space that ends the prompt, or else one space, and the option."""
        gap = self._full_prompt[len(self.stem) :] or " "
        return gap + self.options[option]

    @property
    def _full_prompt(self) -> str:
        return f"{self.context.rstrip()}\n\n{self.prompt}" if self.context.strip() else self.prompt


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, and the file's sha256."""

    questions: tuple[Question, ...]
    sha256: str


def read_questions(file: str) -> QuestionFile:
    """Read the questions of a JSONL file.

    Raises:
        InputError: for a file or a line that cannot be used; one line of text, with the line's number.
    """
    path = Path(file)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"file {file!r} {problem}; name a JSONL file of questions: {FORMAT}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"file {file!r} cannot be read: {error.strerror}") from error
    questions: dict[str, Question] = {}
    for number, line in _lines(file, raw):
        question = _parse_question(f"file {file!r}, line {number}", number, line)
        if question.id in questions:
            raise InputError(
                f"file {file!r}, line {number}: the id {question.id!r} occurs on an earlier line; use unique ids"
            )
        questions[question.id] = question
    if not questions:
        raise InputError(f"file {file!r} contains no question; put one on each line: {FORMAT}")
    return QuestionFile(tuple(questions.values()), hashlib.sha256(raw).hexdigest())


def _lines(file: str, raw: bytes) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines that are not blank; only a line feed ends a line."""
    for number, raw_line in enumerate(raw.split(b"\n"), start=1):
        try:
            line = raw_line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"file {file!r}, line {number}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8"
            ) from error
        if line:
            yield number, line


def _parse_question(location: str, number: int, line: str) -> Question:
    try:
        entry: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{location}: not valid JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise InputError(f"{location}: JSON nested too deeply; expected an object: {FORMAT}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{location}: expected an object: {FORMAT}")
    question_id = entry.get("id", number)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int) or not str(question_id):
        raise InputError(f"{location}: `id` is {question_id!r}; expected text or a whole number")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise InputError(f"{location}: `kind` is {kind!r}; expected contextual or parametric")
    options = _options(location, entry)
    answer = entry.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise InputError(
            f"{location}: `answer` is {answer!r}; expected the right option's index, 0 to {len(options) - 1}"
        )
    prompt = _text(location, entry, "prompt")
    context = _text(location, entry, "context") if entry.get("context") is not None else ""
    unicode_id = _require_unicode(location, "id", str(question_id))
    return Question(unicode_id, str(kind), prompt, options, answer, context)


def _options(location: str, entry: Mapping[str, object]) -> tuple[str, ...]:
    value = entry.get("options")
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{location}: `options` is {value!r}; expected a list of two or more texts")
    for option in value:
        if not isinstance(option, str) or not option.strip():
            raise InputError(f"{location}: option {option!r}; expected a text that is not blank")
    options = tuple(_require_unicode(location, "options", option.strip()) for option in value)
    if len(set(options)) < len(options):
        raise InputError(f"{location}: two options are equal; found {value!r}")
    return options


def _text(location: str, entry: Mapping[str, object], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{location}: `{name}` is {value!r}; expected a text that is not blank")
    return _require_unicode(location, name, value)


def _require_unicode(location: str, name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location}: `{name}` has a lone surrogate at character {error.start + 1}; use valid Unicode"
        ) from error
    return text
