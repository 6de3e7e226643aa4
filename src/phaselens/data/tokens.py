"""Tokens of a text, with the first position settled: BOS or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phaselens.data.reading import Text
from phaselens.errors import InputError

#: `auto`: as the model's own tokenizer does; `always`: BOS first; `never`: no special token is added.
BOS_POLICIES = ("auto", "always", "never")


@dataclass(frozen=True)
class Tokens:
    """The token ids of one text. `full_length` is what it had before it was cut."""

    text: Text
    ids: tuple[int, ...]
    full_length: int

    @property
    def cut(self) -> bool:
        """Whether the text was longer than allowed."""
        return self.full_length > len(self.ids)


def encode(tokenizer: Any, text: Text, *, bos: str, bos_token_id: int | None, max_tokens: int) -> Tokens:
    """`text` as the first `max_tokens` tokens of a Hugging Face tokenizer. InputError where there are
    none."""
    if bos == "always" and bos_token_id is None:
        raise InputError("bos is `always`, but the model has no BOS token; use auto or never")
    ids = list(tokenizer(text.text, add_special_tokens=bos == "auto", verbose=False)["input_ids"])
    if bos == "always":
        ids = [bos_token_id, *ids]
    if not ids:
        raise InputError(f"text {text.id!r} has no tokens (bos: {bos}); remove it or give it words")
    return Tokens(text, tuple(ids[:max_tokens]), len(ids))
