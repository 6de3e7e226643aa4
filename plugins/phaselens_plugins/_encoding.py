"""Token ids of a prompt and its answer: where the answer begins, and prompts of an exact length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from phaselens import plugin

#: What fills the last few tokens. Single signs come after words: they cost one token where a word costs several.
_PADS = (" and", " so", " on", " then", " a", ".", "!", "\n")
_MOST_TRIES = 64


class Encoder(plugin.Encoder):
    """Text to ids as the run does it, and back."""

    def spell(self, token: int) -> str:
        """What a token says, without white space around it."""
        return str(self.tokenizer.decode([token])).strip()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences share from the start.

    >>> common([5, 7, 9], [5, 7, 8, 9])
    2
    """
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return shared


@dataclass(frozen=True)
class Fitted:
    """A text of a wanted number of tokens; `n_before` sentences stand before what was to be placed."""

    text: str
    ids: list[int]
    n_before: int


class Fitter:
    """Finds the filler that brings a text to an exact number of tokens, whatever the tokenizer is."""

    def __init__(self, encode: Encoder) -> None:
        self._encode = encode
        self._costs: dict[str, int] = {}
        stem = "It went on"
        costs = {pad: len(encode(stem + pad * 2)) - len(encode(stem + pad)) for pad in _PADS}
        self._pads = sorted(((cost, pad) for pad, cost in costs.items() if cost > 0), reverse=True)

    def cost(self, sentence: str) -> int:
        """About how many tokens a sentence adds."""
        if sentence not in self._costs:
            one = len(self._encode(f"So. {sentence}"))
            self._costs[sentence] = len(self._encode(f"So. {sentence} {sentence}")) - one
        return self._costs[sentence]

    def fit(
        self,
        length: int,
        depth: float,
        following: Callable[[], str],
        compose: Callable[[str, str], str],
    ) -> Fitted | None:
        """A text of `length` tokens: `compose(before, after)` with sentences from `following` on both sides.

        `depth` is the share of the filler's tokens that goes before. None where the text is too long with no filler.
        What comes closest, and is shorter, is returned where no choice gives the length exactly.
        """
        encode = self._encode
        empty = len(encode(compose("", "")))
        if empty > length:
            return None
        sentences: list[str] = []
        total = empty
        while total + self.cost(sentence := following()) <= length:
            sentences.append(sentence)
            total += self.cost(sentence)
        pads: list[str] = []
        barred: set[str] = set()
        best: Fitted | None = None
        for _ in range(_MOST_TRIES):
            n_before = self._split(sentences, depth)
            before, after = " ".join(sentences[:n_before]), " ".join(sentences[n_before:])
            closing = "".join(pads)
            before, after = (before + closing, after) if depth == 1 else (before, after + closing)
            text = compose(before, after)
            ids = encode(text)
            missing = length - len(ids)
            if missing >= 0 and (best is None or len(ids) > len(best.ids)):
                best = Fitted(text, ids, n_before)
            if missing < 0 and pads:
                barred.add(pads.pop())  # it cost more here than where it was tried
            elif missing < 0 and sentences:
                sentences.pop()
            elif missing > 0 and (pad := self._pad(missing, barred)):
                pads.append(pad)
            else:
                break
        return best

    def _pad(self, missing: int, barred: set[str]) -> str:
        """The longest pad that may fit into `missing` tokens, or nothing."""
        return next((pad for cost, pad in self._pads if cost <= missing and pad not in barred), "")

    def _split(self, sentences: Sequence[str], depth: float) -> int:
        """How many sentences go before, so that their share of the tokens is as near to `depth` as can be."""
        sums = list(accumulate((self.cost(sentence) for sentence in sentences), initial=0))
        return min(range(len(sums)), key=lambda n: abs(sums[n] - depth * sums[-1]))
