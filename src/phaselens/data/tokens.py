"""Tokens of a text, by one rule for every route: what stands at position 0, and what a tokenizer appends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.data.reading import Text
from phaselens.errors import InputError, close_matches, require_whole

#: `auto`: as the model's own tokenizer does; `always`: BOS first; `never`: no special token is added.
BOS_POLICIES = ("auto", "always", "never")

# Short texts that show what a tokenizer adds. A vocabulary that knows none of them is rare.
_PROBES = ("a", "0", ".", "the")
_MOST_NAMES = 3


@dataclass(frozen=True)
class Tokens:
    """The token ids of one text.

    `full_length` is what it had before it was cut. `n_written_bos` is how many BOS tokens the text itself begins with.
    """

    text: Text
    ids: tuple[int, ...]
    full_length: int
    n_written_bos: int = 0

    @property
    def cut(self) -> bool:
        """Whether the text was longer than allowed."""
        return self.full_length > len(self.ids)


class Encoder:
    """Turns texts into token ids under a BOS policy. Runs, prompts, `to_tokens` and tasks all use it.

    In front stands what the model's own tokenizer puts there (`auto`), one BOS token (`always`), or nothing (`never`).
    A text that itself begins with the BOS token has it once under `auto` and `always`, without the white space before
    it, if there is any; under `never` a BOS token that is written in the text is part of the text, and stays.

    Behind a text nothing is added: an EOS token that a tokenizer appends is left out, since what is predicted after it
    does not continue the text. An EOS token that is written in the text stays.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: the policy, one of `BOS_POLICIES`.
        bos_token_id: id of the BOS token; by default the tokenizer's own.

    Attributes:
        tokenizer: the same.
        front: ids that are put before every text.
        left_out: ids that the tokenizer would have appended.

    Raises:
        InputError: for an unknown policy, and for `always` where there is no BOS token.

    >>> from phaselens.testing import tiny_tokenizer
    >>> encode = Encoder(tiny_tokenizer())
    >>> encode("to be") == encode("<s>to be") == [0, 31, 26, 3, 13, 16]
    True
    """

    def __init__(self, tokenizer: Any, *, bos: str = "auto", bos_token_id: int | None = None) -> None:
        if not callable(tokenizer):
            raise InputError(
                f"Encoder takes a Hugging Face tokenizer and got {type(tokenizer).__name__}; a lens has one as "
                "text_tokenizer"
            )
        if bos_token_id is not None:
            require_whole("bos_token_id", bos_token_id, 0)
        require_bos(bos)
        self.bos = bos
        self.tokenizer = tokenizer
        own_id = getattr(tokenizer, "bos_token_id", None)
        self.bos_token_id: int | None = own_id if bos_token_id is None else bos_token_id
        self._n_always_first = 0  # BOS tokens that come first even where no special token is asked for
        self.front: list[int] = []
        self.left_out: list[int] = []
        before, behind = self._added()
        if bos == "auto":
            self.front, self.left_out = before, behind
        elif bos == "always":
            if self.bos_token_id is None:
                raise InputError("bos is `always`, but the model has no BOS token; use auto or never")
            self.front = [self.bos_token_id]

    @property
    def puts_bos_first(self) -> bool:
        """Whether every text begins with the BOS token."""
        return self.front[:1] == [self.bos_token_id]

    def __call__(self, text: str) -> list[int]:
        """Ids of a whole text."""
        return self._read(text)[0]

    def tokens(self, text: Text, max_tokens: int) -> Tokens:
        """The first `max_tokens` tokens of a text.

        Raises:
            InputError: where it has none, and for what is no `Text` or no whole number of at least 1.
        """
        if not isinstance(text, Text):
            raise InputError(
                f"tokens takes a phaselens.data.Text and got {type(text).__name__}; call encoder(text)"
            )
        require_whole("max_tokens", max_tokens, 1)
        ids, n_written_bos = self._read(text.text)
        if not ids:
            raise InputError(f"text {text.id!r} has no tokens (bos: {self.bos}); remove it or give it words")
        return Tokens(text, tuple(ids[:max_tokens]), len(ids), n_written_bos)

    def notes(self, texts: Sequence[Tokens]) -> list[str]:
        """What a reader should know about how these texts were turned into tokens, in sentences."""
        notes = []
        if self.left_out:
            appended = self._names(self.left_out)
            notes.append(
                f"the tokenizer appends {appended} to a text; it is left out, as nothing continues a text after it"
            )
        written = [tokens.text.id for tokens in texts if tokens.n_written_bos]
        return [*notes, *self.notes_on_written_bos(written)]

    def n_written_bos(self, text: str) -> int:
        """How many BOS tokens a text itself begins with."""
        return self._read(text)[1]

    def notes_on_written_bos(self, names: Sequence[str]) -> list[str]:
        """What became of the BOS tokens that these texts themselves begin with; no sentence for no text."""
        if not names or self.bos_token_id is None:
            return []
        verb, token = "begins" if len(names) == 1 else "begin", self._names([self.bos_token_id])
        kept = "it is kept as text" if self.bos == "never" else "BOS is there exactly once"
        return [f"{named(names)} {verb} with the BOS token {token} as written; {kept} (bos: {self.bos})"]

    def _names(self, ids: Sequence[int]) -> str:
        return " ".join(repr(self.tokenizer.convert_ids_to_tokens(token)) for token in ids)

    def _read(self, text: str) -> tuple[list[int], int]:
        """Ids of a text, and how many BOS tokens are written at its start."""
        body = self._bare(self._from_bos(text))
        own = min(self._n_always_first, self._n_leading_bos(body))
        n_written = self._n_leading_bos(body) - own
        n_kept = n_written
        if self.bos != "never":
            n_kept = 0 if self.bos_token_id in self.front else min(n_written, 1)
        return [*self.front, *body[own + n_written - n_kept :]], n_written

    def _from_bos(self, text: str) -> str:
        """The text without white space before a BOS token that is written in it, which would else be a second one."""
        stripped = text.lstrip()
        if self.bos == "never" or stripped == text:
            return text
        return stripped if self._n_leading_bos(self._bare(stripped)) > self._n_always_first else text

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _n_leading_bos(self, ids: Sequence[int]) -> int:
        if self.bos_token_id is None:
            return 0
        return next((n for n, token in enumerate(ids) if token != self.bos_token_id), len(ids))

    def _added(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts before a text (BOS once), and behind one."""
        for probe in _PROBES:
            bare = self._bare(probe)
            whole = list(self.tokenizer(probe, verbose=False)["input_ids"])
            n_first = self._n_leading_bos(bare)
            for start in range(len(whole) - len(bare) + 1):
                if len(bare) > n_first and whole[start : start + len(bare)] == bare:
                    self._n_always_first = n_first
                    return self._once(whole[: start + n_first]), whole[start + len(bare) :]
        # The vocabulary knows none of the probes, so all that came out was added.
        end = len(whole)
        while end and whole[end - 1] == getattr(self.tokenizer, "eos_token_id", None) != self.bos_token_id:
            end -= 1
        return self._once(whole[:end]), whole[end:]

    def _once(self, ids: list[int]) -> list[int]:
        """`ids` with a run of BOS tokens at the start reduced to one."""
        return ids[max(self._n_leading_bos(ids) - 1, 0) :]


def require_bos(bos: Any) -> None:
    """InputError unless it is one of `BOS_POLICIES`, with close matches."""
    if not isinstance(bos, str) or bos not in BOS_POLICIES:
        raise InputError(f"bos is {bos!r}; {close_matches(str(bos), BOS_POLICIES)}")


def named(ids: Sequence[str]) -> str:
    """Texts by their ids: the first few, and how many more there are.

    >>> named(["a"]), named(["a", "b", "c", "d", "e"])
    ("text 'a'", "texts 'a', 'b', 'c' and 2 more")
    """
    shown = ", ".join(map(repr, ids[:_MOST_NAMES]))
    more = f" and {len(ids) - _MOST_NAMES} more" if len(ids) > _MOST_NAMES else ""
    return f"text{'' if len(ids) == 1 else 's'} {shown}{more}"
