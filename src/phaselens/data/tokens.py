"""Tokenize texts by one rule: which token is at position 0, and what happens to tokens that a tokenizer appends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.data.text import Text
from phaselens.errors import (
    InputError,
    close_matches,
    require_text,
    require_unicode,
    require_whole,
    short_form,
)

#: The BOS policies, and what each puts before a text.
BOS_POLICIES = {
    "auto": "position 0 as the model's tokenizer makes it",
    "always": "one BOS token at position 0",
    "never": "no token is added before a text",
}

# Short texts that show what a tokenizer adds. A vocabulary without any of them is rare.
_PROBES = ("a", "0", ".", "the")
_MAX_NAMES = 3


@dataclass(frozen=True)
class TokenizedText:
    """A text and its token ids.

    `full_length` is the number of tokens before the text was cut, `n_written_bos` the number of BOS tokens that are
    written at the start of the text itself.
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
    """Turns texts into token ids under a BOS policy; used by runs, prompts, `to_tokens` and tasks.

    Before each text it puts the ids that the model's own tokenizer puts there (`auto`), one BOS token (`always`), or
    nothing (`never`). A text that itself begins with the BOS token has it once under `auto` and `always`, without
    white space before it; under `never` a BOS token that is written in the text is part of the text, and stays.

    Nothing is added after a text: an EOS token that a tokenizer appends is left out, because predictions after it do
    not continue the text. An EOS token that is written in the text stays.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: the policy, one of `BOS_POLICIES`.
        bos_token_id: id of the BOS token; by default the tokenizer's own.

    Attributes:
        tokenizer: the tokenizer.
        prefix_ids: ids that are put before every text.
        dropped_ids: ids that the tokenizer appends by itself, and that are left out.

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
                f"expected tokenizer as a Hugging Face tokenizer, received {short_form(tokenizer)}; a lens has one "
                "as text_tokenizer"
            )
        if bos_token_id is not None:
            require_whole("bos_token_id", bos_token_id, 0)
        require_bos(bos)
        self.bos = bos
        self.tokenizer = tokenizer
        tokenizer_id = getattr(tokenizer, "bos_token_id", None)
        self.bos_token_id: int | None = tokenizer_id if bos_token_id is None else bos_token_id
        self._n_always_first = 0  # BOS tokens that come first even without special tokens
        self.prefix_ids: list[int] = []
        self.dropped_ids: list[int] = []
        prefix, suffix = self._added_ids()
        if bos == "auto":
            self.prefix_ids, self.dropped_ids = prefix, suffix
        elif bos == "always":
            if self.bos_token_id is None:
                raise InputError("bos is `always`, but the model has no BOS token; use auto or never")
            self.prefix_ids = [self.bos_token_id]

    @property
    def puts_bos_first(self) -> bool:
        """Whether every text begins with the BOS token."""
        return self.prefix_ids[:1] == [self.bos_token_id]

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a whole text; InputError for anything but text that UTF-8 can encode."""
        require_text("a text to encode", text)
        require_unicode("a text to encode", text)
        return self._encode(text)[0]

    def tokenize(self, text: Text, max_tokens: int) -> TokenizedText:
        """Return the first `max_tokens` tokens of a text.

        Raises:
            InputError: for a text without tokens, and for arguments of other types or a `max_tokens` below 1.
        """
        if not isinstance(text, Text):
            raise InputError(
                f"expected text as a phaselens.data.Text, received {short_form(text)}; call encoder(text)"
            )
        require_whole("max_tokens", max_tokens, 1)
        ids, n_written_bos = self._encode(text.text)
        if not ids:
            raise InputError(f"text {text.id!r} has no tokens (bos: {self.bos}); remove it or give it words")
        return TokenizedText(text, tuple(ids[:max_tokens]), len(ids), n_written_bos)

    def character_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the characters (start, end) that each token of a text comes from, without tokens that are added.

        Raises:
            InputError: for a tokenizer without this information (one that is written in Python).
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(self.tokenizer).__name__} does not say which characters its tokens come from, so documents "
                "cannot be cut into windows of tokens; cut them yourself, or use a tokenizer of the library tokenizers"
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(int(start), int(end)) for start, end in encoding["offset_mapping"]]

    def notes(self, tokenized_texts: Sequence[TokenizedText]) -> list[str]:
        """Return notes for the reader on how these texts were tokenized."""
        notes = []
        if self.dropped_ids:
            appended = self._quote_tokens(self.dropped_ids)
            notes.append(
                f"the tokenizer appends {appended} to a text; it is left out, because nothing continues a text after it"
            )
        with_written_bos = [text.text.id for text in tokenized_texts if text.n_written_bos]
        return [*notes, *self.notes_on_written_bos(with_written_bos)]

    def n_written_bos(self, text: str) -> int:
        """Return the number of BOS tokens that are written at the start of a text."""
        return self._encode(text)[1]

    def notes_on_written_bos(self, text_ids: Sequence[str]) -> list[str]:
        """Return a sentence about the BOS tokens that are written at the start of these texts; none without texts."""
        if not text_ids or self.bos_token_id is None:
            return []
        verb, token = (
            "itself begins" if len(text_ids) == 1 else "themselves begin",
            self._quote_tokens([self.bos_token_id]),
        )
        effect = "it is kept as text" if self.bos == "never" else "no second one is added"
        return [f"{name_texts(text_ids)} {verb} with BOS {token}; {effect} (bos: {self.bos})"]

    def _quote_tokens(self, ids: Sequence[int]) -> str:
        return " ".join(repr(self.tokenizer.convert_ids_to_tokens(token)) for token in ids)

    def _encode(self, text: str) -> tuple[list[int], int]:
        """Return the ids of a text, and the number of BOS tokens that are written at its start."""
        body = self._bare_ids(self._strip_before_bos(text))
        n_automatic = min(self._n_always_first, self._n_leading_bos(body))
        n_written = self._n_leading_bos(body) - n_automatic
        n_kept = n_written
        if self.bos != "never":
            n_kept = 0 if self.bos_token_id in self.prefix_ids else min(n_written, 1)
        return [*self.prefix_ids, *body[n_automatic + n_written - n_kept :]], n_written

    def _strip_before_bos(self, text: str) -> str:
        """Return the text without white space before a written BOS token, which would otherwise be a second one."""
        stripped = text.lstrip()
        if self.bos == "never" or stripped == text:
            return text
        return stripped if self._n_leading_bos(self._bare_ids(stripped)) > self._n_always_first else text

    def _bare_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _n_leading_bos(self, ids: Sequence[int]) -> int:
        if self.bos_token_id is None:
            return 0
        return next((n for n, token in enumerate(ids) if token != self.bos_token_id), len(ids))

    def _added_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer itself puts before a text (BOS once) and after it."""
        for probe in _PROBES:
            bare_ids = self._bare_ids(probe)
            full_ids = list(self.tokenizer(probe, verbose=False)["input_ids"])
            n_first = self._n_leading_bos(bare_ids)
            for start in range(len(full_ids) - len(bare_ids) + 1):
                if len(bare_ids) > n_first and full_ids[start : start + len(bare_ids)] == bare_ids:
                    self._n_always_first = n_first
                    return self._with_one_bos(full_ids[: start + n_first]), full_ids[start + len(bare_ids) :]
        # The vocabulary has none of the probes, so the tokenizer added all ids.
        end = len(full_ids)
        while end and full_ids[end - 1] == getattr(self.tokenizer, "eos_token_id", None) != self.bos_token_id:
            end -= 1
        return self._with_one_bos(full_ids[:end]), full_ids[end:]

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Return `ids` with a run of BOS tokens at the start reduced to one."""
        return ids[max(self._n_leading_bos(ids) - 1, 0) :]


def require_bos(bos: object) -> None:
    """Raise InputError with close matches unless `bos` is one of `BOS_POLICIES`."""
    if not isinstance(bos, str) or bos not in BOS_POLICIES:
        raise InputError(f"bos is {short_form(bos)}; {close_matches(str(bos), BOS_POLICIES)}")


def name_texts(ids: Sequence[str]) -> str:
    """Return a phrase that names texts by their ids: the first few, and the number of further ones.

    >>> name_texts(["a"]), name_texts(["a", "b", "c", "d", "e"])
    ("text 'a'", "texts 'a', 'b', 'c' and 2 more")
    """
    first_ids = ", ".join(map(repr, ids[:_MAX_NAMES]))
    more = f" and {len(ids) - _MAX_NAMES} more" if len(ids) > _MAX_NAMES else ""
    return f"text{'' if len(ids) == 1 else 's'} {first_ids}{more}"
