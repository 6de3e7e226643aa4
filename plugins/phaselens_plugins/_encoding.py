"""Token ids of prompts: where an answer begins, and texts of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from phaselens import plugin

#: Texts that fill the last few tokens: words, then single characters, which are one token where a word is several.
_PADS = (" and", " so", " on", " then", " a", ".", "!", "\n")
_MAX_ATTEMPTS = 64


class PromptEncoder(plugin.Encoder):
    """Encoder of text as in a run, and decoder of single tokens."""

    def token_text(self, token: int) -> str:
        """Return the text of a token, without white space around it."""
        return str(self.tokenizer.decode([token])).strip()


def shared_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of ids that two sequences share from the start.

    >>> shared_prefix_length([5, 7, 9], [5, 7, 8, 9])
    2
    """
    n_shared = 0
    for first_id, second_id in zip(first, second, strict=False):
        if first_id != second_id:
            break
        n_shared += 1
    return n_shared


@dataclass(frozen=True)
class FittedText:
    """A text fitted to a number of tokens, with its ids."""

    text: str
    ids: list[int]


class TextFitter:
    """Fitter of filler that brings a text to an exact number of tokens, with any tokenizer."""

    def __init__(self, encode: PromptEncoder) -> None:
        self._encode = encode
        self._costs: dict[str, int] = {}
        stem = "It went on"
        costs = {pad: len(encode(stem + pad * 2)) - len(encode(stem + pad)) for pad in _PADS}
        self._pads = sorted(((cost, pad) for pad, cost in costs.items() if cost > 0), reverse=True)

    def cost(self, sentence: str) -> int:
        """Return the approximate number of tokens that a sentence adds."""
        if sentence not in self._costs:
            n_single = len(self._encode(f"So. {sentence}"))
            self._costs[sentence] = len(self._encode(f"So. {sentence} {sentence}")) - n_single
        return self._costs[sentence]

    def fit(
        self,
        length: int,
        depth: float,
        next_sentence: Callable[[], str],
        compose: Callable[[str, str], str],
    ) -> FittedText | None:
        """Return a text of `length` tokens: `compose(before, after)` with sentences from `next_sentence` on both sides.

        `depth` is the share of the filler's tokens in `before`. None where the text is too long without filler. If no
        choice of filler has the exact length, the longest text below it is returned.
        """
        encode = self._encode
        n_minimum = len(encode(compose("", "")))
        if n_minimum > length:
            return None
        sentences: list[str] = []
        n_estimated = n_minimum
        while n_estimated + self.cost(sentence := next_sentence()) <= length:
            sentences.append(sentence)
            n_estimated += self.cost(sentence)
        pads: list[str] = []
        rejected: set[str] = set()
        longest: FittedText | None = None
        for _ in range(_MAX_ATTEMPTS):
            n_before = self._n_before(sentences, depth)
            before, after = " ".join(sentences[:n_before]), " ".join(sentences[n_before:])
            padding = "".join(pads)
            before, after = (before + padding, after) if depth == 1 else (before, after + padding)
            text = compose(before, after)
            ids = encode(text)
            n_missing = length - len(ids)
            if n_missing >= 0 and (longest is None or len(ids) > len(longest.ids)):
                longest = FittedText(text, ids)
            if n_missing < 0 and pads:
                rejected.add(pads.pop())  # it has more tokens here than in the text that measured its cost
            elif n_missing < 0 and sentences:
                sentences.pop()
            elif n_missing > 0 and (pad := self._largest_pad(n_missing, rejected)):
                pads.append(pad)
            else:
                break
        return longest

    def _largest_pad(self, n_missing: int, rejected: set[str]) -> str:
        """Return the longest pad that may fit into `n_missing` tokens, or an empty text."""
        return next((pad for cost, pad in self._pads if cost <= n_missing and pad not in rejected), "")

    def _n_before(self, sentences: Sequence[str], depth: float) -> int:
        """Return the number of sentences before the key whose share of the tokens is nearest to `depth`."""
        sums = list(accumulate((self.cost(sentence) for sentence in sentences), initial=0))
        return min(range(len(sums)), key=lambda n: abs(sums[n] - depth * sums[-1]))
