"""Texts that hide a key: an opening, filler, the sentence that names the key, more filler, a question at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from phaselens.plugin import InputError
from phaselens_plugins._encoding import Encoder, Fitter, common

OPENING = "Somewhere in this text there is a secret number. Keep it in mind."
NEEDLE = "The secret number is {key}."
QUESTION = "What is the secret number? The secret number is"
ANSWER = " {key}"

#: Plain sentences without a sign that a key could hold.
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


def lengths(text: str, n_ctx: int | None) -> list[int]:
    """Numbers of tokens from `512, n_ctx, 2*n_ctx, n_ctx/4`; `n_ctx` is what the model was made for.

    >>> lengths("100, n_ctx/4, 2*n_ctx", 512)
    [100, 128, 1024]
    """
    found = []
    for part in _parts(text, "lengths"):
        expression = _EXPRESSION.fullmatch(part)
        if part.isdecimal():
            value = int(part)
        elif not expression:
            raise InputError(
                f"lengths: {part!r}; write numbers of tokens, n_ctx, 2*n_ctx or n_ctx/4, with commas between"
            )
        elif n_ctx is None:
            raise InputError(
                f"lengths: {part!r}, but the model does not say what length it was made for; write numbers"
            )
        else:
            value = int(n_ctx * float(expression[1] or 1) / int(expression[2] or 1))
        if value < 1:
            raise InputError(f"lengths: {part!r} is no length; the least is 1 token")
        found.append(value)
    return list(dict.fromkeys(found))


def depths(text: str) -> list[float]:
    """Shares of the filler that go before the key, from `0, 0.5, 1`."""
    found = []
    for part in _parts(text, "depths"):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise InputError(
                f"depths: {part!r}; write numbers from 0 (the beginning) to 1 (the end), with commas between"
            )
        found.append(value)
    return list(dict.fromkeys(found))


def _parts(text: str, name: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{name} is {text!r}; name at least one")
    return parts


@dataclass(frozen=True)
class Case:
    """One prompt that is wanted: `number` counts those of a cell. In a null prompt the key is not to be found."""

    length: int
    depth: float
    number: int
    null: bool = False

    @property
    def id(self) -> str:
        """A name of its own."""
        return f"{self.length}/{self.depth:g}/{self.number}{'/null' if self.null else ''}"

    @property
    def twin(self) -> Case:
        """The null prompt beside it."""
        return Case(self.length, self.depth, self.number, True)


@dataclass(frozen=True)
class Hidden:
    """A prompt that was made. `ids` end with the key; those from `scored_from` on are scored.

    `key_at` is the position of the key's first token in the text, None where it is not there; `copied` says whether
    the key is made of the same tokens there and in the answer; `merged` whether the tokenizer joins the answer with the
    end of the question, so that scoring begins there.
    """

    case: Case
    key: str
    ids: tuple[int, ...]
    scored_from: int
    key_at: int | None
    copied: bool
    merged: bool


class Writer:
    """Makes prompts for one tokenizer."""

    def __init__(self, encode: Encoder, *, digits: int, symbols: str, seed: int) -> None:
        self._encode = encode
        self._digits = digits
        self._symbols = symbols
        self._seed = seed
        self._fit = Fitter(encode)
        self._require_spelled()

    def _require_spelled(self) -> None:
        ids = {symbol: tuple(self._encode(ANSWER.format(key=symbol))) for symbol in self._symbols}
        for symbol, own in ids.items():
            alike = [other for other in self._symbols if other != symbol and ids[other] == own]
            if alike:
                raise InputError(
                    f"the tokenizer does not tell {symbol!r} from {alike[0]!r}, so no key can be made of them; "
                    "give other signs by -P passkey.symbols=…"
                )

    def write(self, case: Case, null: str) -> Hidden | None:
        """The prompt of a case, exactly `case.length` tokens with its answer; None where that is too short.

        `null` says what a null prompt has where its twin has the key: nothing (`removed`) or another key (`other`).
        """
        draw = random.Random(f"{self._seed}/{case.length}/{case.depth}/{case.number}")
        key, other = self._key(draw), self._key(draw)
        while other == key:
            other = self._key(draw)
        needle = NEEDLE.format(key=other if case.null else key)
        if case.null and null == "removed":
            needle = ""
        answer = ANSWER.format(key=key)

        def compose(before: str, after: str) -> str:
            parts = (OPENING, before.strip(" "), needle, after.strip(" "), QUESTION)
            return " ".join(part for part in parts if part) + answer

        fitted = self._fit.fit(case.length, case.depth, sentences(draw).__next__, compose)
        if fitted is None:
            return None
        question = fitted.text[: -len(answer)]
        asked = self._encode(question)
        scored_from = common(asked, fitted.ids)
        key_at, copied = self._find(fitted.text, needle, key, fitted.ids[scored_from:])
        merged = scored_from < len(asked)
        return Hidden(case, key, tuple(fitted.ids), scored_from, key_at, copied, merged)

    def _find(self, text: str, needle: str, key: str, answer: Sequence[int]) -> tuple[int | None, bool]:
        """Where the key stands in the text, and whether in the answer's tokens."""
        if not needle or key not in needle:
            return None, False
        before = text[: text.index(needle) + needle.index(key)].rstrip()
        ids = self._encode(text)
        at = common(self._encode(before), ids)
        return at, list(ids[at : at + len(answer)]) == list(answer)

    def _key(self, draw: random.Random) -> str:
        return "".join(draw.choice(self._symbols) for _ in range(self._digits))


def sentences(draw: random.Random) -> Iterator[str]:
    """The filler's sentences without end, each once before any comes again."""
    while True:
        yield from draw.sample(FILLER, len(FILLER))


def agreement(
    top: Sequence[int], targets: Sequence[int], symbols: str, spell: Callable[[int], str]
) -> tuple[int, int]:
    """How many of a key's signs the predicted tokens have in the right place, and how many signs there are.

    A token may hold several signs; each is compared with the one in the same place of the predicted token.

    >>> words = {1: "12", 2: "13", 3: "", 4: "4"}
    >>> agreement([2, 4], [1, 4], "0123456789", words.__getitem__)
    (2, 3)
    """
    right = total = 0
    for said, wanted in zip(top, targets, strict=True):
        found = spell(said)
        for place, sign in enumerate(spell(wanted)):
            if sign in symbols:
                total += 1
                right += found[place : place + 1] == sign
    return right, total
