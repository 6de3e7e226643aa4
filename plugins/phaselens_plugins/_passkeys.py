"""Prompts that hide a key: an opening, filler, the sentence with the key, more filler, and a question at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from phaselens.plugin import InputError
from phaselens_plugins._encoding import PromptEncoder, TextFitter, shared_prefix_length
from phaselens_plugins._number_lists import parse_numbers

OPENING = "Somewhere in this text there is a secret number. Keep it in mind."
NEEDLE = "The secret number is {key}."
QUESTION = "What is the secret number? The secret number is"
ANSWER = " {key}"

#: Sentences without a digit, so that no key occurs in them.
FILLER = (
    "The sun went down behind the hills.",
    "A small boat lay by the river.",
    "The old man walked slowly to the gate.",
    "She opened the window and looked out.",
    "The horses were tired after the long road.",
    "Nobody spoke for a while.",
    "The rain had stopped at last.",
    "A dog barked in the yard.",
    "They sat by the fire and waited.",
    "The bread was warm and the tea was strong.",
    "The children ran across the field.",
    "He put the letter back into the drawer.",
    "In the evening the wind turned cold.",
    "The bell of the church rang twice.",
    "Her sister lived on the other side of the town.",
    "The train was late, as it always was.",
    "There was snow on the roof and ice on the pond.",
    "The carpenter mended the broken chair.",
    "A cat slept on the wall in the sun.",
    "The market was full of people and noise.",
    "He read the same page again and again.",
    "The lamp gave little light.",
    "Apples lay in the grass under the trees.",
    "The doctor came early in the morning.",
    "They spoke of the weather and of the harvest.",
    "The path led through a dark wood.",
    "A stranger asked them for the way to the sea.",
    "The door was open, but the house was empty.",
    "She had never liked the colour of that coat.",
    "The soldiers went home when the war was over.",
    "His brother kept bees behind the barn.",
    "The water in the well was clear and cold.",
    "A woman sold flowers at the corner.",
    "The clock on the shelf had stopped.",
    "The fishermen mended their nets on the beach.",
    "It was late, and the street was quiet.",
    "The boy threw a stone into the lake.",
    "The soup was too hot to eat.",
    "Clouds came up from the west.",
    "He had forgotten where he left his hat.",
)

_EXPRESSION = re.compile(r"(?:(\d+(?:\.\d+)?) ?\* ?)?n_ctx(?: ?/ ?(\d+))?")


def parse_lengths(text: str, n_ctx: int | None) -> list[int]:
    """Parse numbers of tokens such as `512, n_ctx, 2*n_ctx, n_ctx/4`; `n_ctx` is the model's context length.

    >>> parse_lengths("100, n_ctx/4, 2*n_ctx", 512)
    [100, 128, 1024]
    """
    lengths = []
    for entry in _split_list(text, "lengths"):
        expression = _EXPRESSION.fullmatch(entry)
        if entry.isdecimal():
            length = int(entry)
        elif not expression:
            raise InputError(
                f"lengths: {entry!r}; write numbers of tokens, n_ctx, 2*n_ctx or n_ctx/4, separated by commas"
            )
        elif n_ctx is None:
            raise InputError(
                f"lengths: {entry!r}, but the model does not state its context length; write numbers"
            )
        else:
            length = int(n_ctx * float(expression[1] or 1) / int(expression[2] or 1))
        if length < 1:
            raise InputError(f"lengths: {entry!r} is not a length; the minimum is 1 token")
        lengths.append(length)
    return list(dict.fromkeys(lengths))


def parse_depths(text: str) -> list[float]:
    """Parse shares of the filler that precede the key, such as `0, 0.5, 1`."""
    return parse_numbers(
        _split_list(text, "depths"),
        lambda depth: 0 <= depth <= 1,
        "depths: {entry!r}; write numbers from 0 (the beginning) to 1 (the end), separated by commas",
    )


def _split_list(text: str, name: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise InputError(f"{name} is {text!r}; give at least one")
    return entries


@dataclass(frozen=True)
class PasskeyCase:
    """Specification of one prompt. `number` counts the prompts of a cell. A null prompt's text has no key."""

    length: int
    depth: float
    number: int
    null: bool = False

    @property
    def id(self) -> str:
        """The prompt's unique name."""
        return f"{self.length}/{self.depth:g}/{self.number}{'/null' if self.null else ''}"

    @property
    def twin(self) -> PasskeyCase:
        """The null prompt of the same length, depth and number."""
        return PasskeyCase(self.length, self.depth, self.number, True)


@dataclass(frozen=True)
class PasskeyPrompt:
    """A prompt made from a case.

    Attributes:
        case: its specification.
        key: the right answer.
        ids: all token ids; they end with the key.
        scored_from: position of the first scored token.
        key_at: position of the key's first token in the text; None if the text does not contain it.
        is_copied: whether the key has the same tokens in the text and in the answer.
        is_merged: whether the tokenizer joins the answer with the end of the question; scoring then begins there.
    """

    case: PasskeyCase
    key: str
    ids: tuple[int, ...]
    scored_from: int
    key_at: int | None
    is_copied: bool
    is_merged: bool


class PromptWriter:
    """Writer of prompts for one tokenizer."""

    def __init__(self, encode: PromptEncoder, *, digits: int, symbols: str, seed: int) -> None:
        self._encode = encode
        self._digits = digits
        self._symbols = symbols
        self._seed = seed
        self._fitter = TextFitter(encode)
        self._require_distinct_symbols()

    def _require_distinct_symbols(self) -> None:
        ids_of = {symbol: tuple(self._encode(ANSWER.format(key=symbol))) for symbol in self._symbols}
        for symbol, ids in ids_of.items():
            duplicates = [other for other in self._symbols if other != symbol and ids_of[other] == ids]
            if duplicates:
                raise InputError(
                    f"the tokenizer gives {symbol!r} and {duplicates[0]!r} the same tokens, so keys cannot be made of "
                    "them; set other symbols with -P passkey.symbols=…"
                )

    def write(self, case: PasskeyCase, null: str) -> PasskeyPrompt | None:
        """Return the prompt of a case, exactly `case.length` tokens with its answer; None if that is too short.

        `null` determines what replaces the key in a null prompt: nothing (`removed`) or another key (`other`).
        """
        generator = random.Random(f"{self._seed}/{case.length}/{case.depth}/{case.number}")
        key, other_key = self._draw_key(generator), self._draw_key(generator)
        while other_key == key:
            other_key = self._draw_key(generator)
        needle = NEEDLE.format(key=other_key if case.null else key)
        if case.null and null == "removed":
            needle = ""
        answer = ANSWER.format(key=key)

        def compose(before: str, after: str) -> str:
            segments = (OPENING, before.strip(" "), needle, after.strip(" "), QUESTION)
            return " ".join(segment for segment in segments if segment) + answer

        fitted = self._fitter.fit(case.length, case.depth, shuffled_sentences(generator).__next__, compose)
        if fitted is None:
            return None
        question_ids = self._encode(fitted.text[: -len(answer)])
        scored_from = shared_prefix_length(question_ids, fitted.ids)
        key_at, is_copied = self._locate_key(fitted.text, needle, key, fitted.ids[scored_from:])
        is_merged = scored_from < len(question_ids)
        return PasskeyPrompt(case, key, tuple(fitted.ids), scored_from, key_at, is_copied, is_merged)

    def _locate_key(
        self, text: str, needle: str, key: str, answer_ids: Sequence[int]
    ) -> tuple[int | None, bool]:
        """Return the position of the key in the text, and whether it has the answer's tokens there."""
        if not needle or key not in needle:
            return None, False
        text_before_key = text[: text.index(needle) + needle.index(key)].rstrip()
        ids = self._encode(text)
        position = shared_prefix_length(self._encode(text_before_key), ids)
        return position, list(ids[position : position + len(answer_ids)]) == list(answer_ids)

    def _draw_key(self, generator: random.Random) -> str:
        return "".join(generator.choice(self._symbols) for _ in range(self._digits))


def shuffled_sentences(generator: random.Random) -> Iterator[str]:
    """Yield the filler's sentences without end, each once before any is repeated."""
    while True:
        yield from generator.sample(FILLER, len(FILLER))


def count_matching_symbols(
    top: Sequence[int], targets: Sequence[int], symbols: str, token_text: Callable[[int], str]
) -> tuple[int, int]:
    """Count a key's symbols that the predicted tokens have in the right place, and all its symbols.

    A token may hold several symbols; each is compared with that in the same place of the predicted token.

    >>> words = {1: "12", 2: "13", 3: "", 4: "4"}
    >>> count_matching_symbols([2, 4], [1, 4], "0123456789", words.__getitem__)
    (2, 3)
    """
    n_right = n_symbols = 0
    for predicted_id, target_id in zip(top, targets, strict=True):
        predicted = token_text(predicted_id)
        for index, symbol in enumerate(token_text(target_id)):
            if symbol in symbols:
                n_symbols += 1
                n_right += predicted[index : index + 1] == symbol
    return n_right, n_symbols
