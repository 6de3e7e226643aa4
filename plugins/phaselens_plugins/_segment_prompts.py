"""Passkey prompts with distractors, and the segment of each of their tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from phaselens_plugins._common import TableRow
from phaselens_plugins._encoding import PromptEncoder, TextFitter, shared_prefix_length
from phaselens_plugins._passkeys import ANSWER, NEEDLE, OPENING, QUESTION, PasskeyCase, shuffled_sentences

BEGIN, FIRST, NEEDLE_SEGMENT, DISTRACTORS, RECENT, REST = SEGMENTS = (
    "begin", "first", "needle", "distractors", "recent", "rest",
)  # fmt: skip
"""Position 0, the other first tokens, the sentence with the key, sentences with other keys, the last tokens before the
answer, and all other tokens. A token that is in several is in the needle, a distractor, the first, the last, in this
order."""
N_EDGE = 32
"""Tokens of the segments `first` (position 0 included in the count) and `recent`."""
DISTRACTOR = "The {name} number is {key}."
#: Names that distractors give to their numbers.
NAMES = ("house", "lucky", "ticket", "page", "phone", "winning", "room", "train")


@dataclass(frozen=True)
class SegmentPrompt:
    """A prompt that ends with the key, the segment of each token, and where the key is.

    Attributes:
        case: its specification.
        ids: all token ids; they end with the key.
        segments: the number of each token's segment in `SEGMENTS`; tokens of the answer are in none (−1).
        scored_from: position of the answer's first token.
        key_at: position of the key's first token in the needle.
        is_copied: whether the key has the same tokens in the needle and in the answer.
    """

    case: PasskeyCase
    ids: tuple[int, ...]
    segments: tuple[int, ...]
    scored_from: int
    key_at: int
    is_copied: bool

    @property
    def row(self) -> TableRow:
        """The prompt's row of the table `prompts`."""
        counts = (self.segments.count(segment) for segment in range(len(SEGMENTS)))
        case = self.case
        return case.id, case.length, case.depth, len(self.ids), self.key_at, int(self.is_copied), *counts

    def copied_position(self, query: int) -> int | None:
        """Return the position of the token that the query at a position has to copy; None for other queries."""
        step = query + 1 - self.scored_from
        return self.key_at + step if self.is_copied and 0 <= step < len(self.ids) - self.scored_from else None


class SegmentWriter:
    """Writer of prompts for one tokenizer."""

    def __init__(
        self, encode: PromptEncoder, *, digits: int, symbols: str, n_distractors: int, seed: int
    ) -> None:
        self._encode = encode
        self._digits = digits
        self._symbols = symbols
        self._n_distractors = n_distractors
        self._seed = seed
        self._fitter = TextFitter(encode)

    def write(self, case: PasskeyCase) -> SegmentPrompt | None:
        """Return the prompt of a case, `case.length` tokens with its answer; None if that is too short."""
        generator = random.Random(f"{self._seed}/{case.length}/{case.depth}/{case.number}")
        key = self._draw_key(generator, set())
        needle, answer = NEEDLE.format(key=key), ANSWER.format(key=key)
        names = generator.sample(NAMES, self._n_distractors)
        other_keys: set[str] = {key}
        distractors = []
        for name in names:
            other_keys.add(other_key := self._draw_key(generator, other_keys))
            distractors.append(DISTRACTOR.format(name=name, key=other_key))
        shares = sorted(generator.random() for _ in distractors)

        def compose(before: str, after: str) -> str:
            before, after = _with_distractors(before, after, distractors, shares)
            parts = (OPENING, before.strip(" "), needle, after.strip(" "), QUESTION)
            return " ".join(part for part in parts if part) + answer

        fitted = self._fitter.fit(case.length, case.depth, shuffled_sentences(generator).__next__, compose)
        if fitted is None:
            return None
        text, ids = fitted.text, fitted.ids
        scored_from = shared_prefix_length(self._encode(text[: -len(answer)]), ids)
        start = text.index(needle)
        key_at = self._position(text, start + needle.index(key), ids)
        spans = {NEEDLE_SEGMENT: [self._span(text, start, needle, ids)]}
        spans[DISTRACTORS] = [
            self._span(text, text.index(distractor), distractor, ids) for distractor in distractors
        ]
        answer_ids = ids[scored_from:]
        is_copied = list(ids[key_at : key_at + len(answer_ids)]) == list(answer_ids)
        segments = _segments(len(ids), scored_from, spans)
        return SegmentPrompt(case, tuple(ids), segments, scored_from, key_at, is_copied)

    def _position(self, text: str, start: int, ids: Sequence[int]) -> int:
        """Return the position of the token that begins at a character of the text, or holds it."""
        return shared_prefix_length(self._encode(text[:start].rstrip()), ids)

    def _span(self, text: str, start: int, sentence: str, ids: Sequence[int]) -> tuple[int, int]:
        """Return the positions (first, end) of a sentence's tokens."""
        end = shared_prefix_length(self._encode(text[: start + len(sentence)]), ids)
        return self._position(text, start, ids), end

    def _draw_key(self, generator: random.Random, used_keys: set[str]) -> str:
        key = "".join(generator.choice(self._symbols) for _ in range(self._digits))
        return self._draw_key(generator, used_keys) if key in used_keys else key


def _with_distractors(
    before: str, after: str, distractors: Sequence[str], shares: Sequence[float]
) -> tuple[str, str]:
    """Return the filler before and after the needle with distractors between its sentences, at shares of all filler."""
    sentences = [re.findall(r"[^.]*\.|[^.]+$", part) for part in (before, after)]
    n_before, n_all = len(sentences[0]), len(sentences[0]) + len(sentences[1])
    for distractor, share in sorted(zip(distractors, shares, strict=True), key=lambda pair: -pair[1]):
        index = round(share * n_all)
        part, offset = (0, index) if index <= n_before else (1, index - n_before)
        sentences[part].insert(offset, f" {distractor}")
    before, after = ("".join(part) for part in sentences)
    return before, after


def _segments(n: int, scored_from: int, spans: dict[str, list[tuple[int, int]]]) -> tuple[int, ...]:
    """Return the segment of each of `n` tokens, given the spans of the needle and of the distractors."""
    names = [REST] * n
    names[max(0, scored_from - N_EDGE) : scored_from] = [RECENT] * min(N_EDGE, scored_from)
    names[: min(N_EDGE, scored_from)] = [FIRST] * min(N_EDGE, scored_from)
    names[:1] = [BEGIN]
    for name in (DISTRACTORS, NEEDLE_SEGMENT):
        for first, end in spans[name]:
            names[first:end] = [name] * (end - first)
    return tuple(SEGMENTS.index(name) for name in names[:scored_from]) + (-1,) * (n - scored_from)


def n_visible(query: int, window: int | None) -> int:
    """Return the number of keys that a query sees."""
    return query + 1 if window is None else min(query + 1, window)


def uniform_masses(segments: Sequence[int], query: int, window: int | None) -> list[float]:
    """Return the share of each segment among the keys that a query sees."""
    n = n_visible(query, window)
    visible = segments[query + 1 - n : query + 1]
    return [visible.count(segment) / n for segment in range(len(SEGMENTS))]
