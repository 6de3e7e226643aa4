"""Prompts: the tokens that a model reads for a text, and two prompts side by side."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phaselens.data import Text
from phaselens.errors import InputError, short_form
from phaselens.lens.info import require_lens
from phaselens.patching.html import result_html
from phaselens.patching.wording import count_phrase
from phaselens.plugin import Column, Table, TableSpec

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


_POSITION = Column("pos", int, "index", "position, 0-based")
_PROMPT_TABLE = TableSpec(
    "tokens", (_POSITION, Column("token", str), Column("id", int)), "The tokens of a prompt."
)
_ALIGNMENT_TABLE = TableSpec(
    "alignment",
    (_POSITION, Column("clean", str), Column("corrupt", str), Column("differs", str, None, "= or ≠")),
    "The tokens of two prompts.",
)


def token_text(lens: HookedTransformer, token: int) -> str:
    """Return one token as a Python string literal: spaces are visible, and control characters are escaped.

    Without a tokenizer it is the token's id, such as `#17`.
    """
    if lens.text_tokenizer is None:
        return f"#{token}"
    return repr(lens.text_tokenizer.decode([token], clean_up_tokenization_spaces=False))


@dataclass(frozen=True, repr=False)
class Prompt:
    """A text and its token ids for a model; made by `prompt`.

    `notes` say where the ids differ from what the tokenizer returns by itself.
    """

    lens: HookedTransformer
    text: str
    ids: tuple[int, ...]
    bos: str = "auto"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A model of `phaselens repl` wraps its lens, and two prompts belong together if their lens is the same object.
        object.__setattr__(self, "lens", inspect.unwrap(self.lens))

    @property
    def tokens(self) -> Tensor:
        """The ids as a tensor [1, pos], on the model's device."""
        import torch

        return torch.tensor([self.ids], device=self.lens.device)

    @property
    def words(self) -> list[str]:
        """Each token as quoted text; see `token_text`."""
        return [token_text(self.lens, token) for token in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        table = _PROMPT_TABLE.build(
            (position, word, token)
            for position, (word, token) in enumerate(zip(self.words, self.ids, strict=True))
        )
        title = f"{count_phrase(len(self), 'token')} of {self.lens.info.label!r}"
        return result_html(title, table, [f"note: {note}" for note in self.notes])

    def __str__(self) -> str:
        title = f"{count_phrase(len(self), 'token')} of {self.lens.info.label!r}:"
        tokens = " ".join([title, *(f"{position}{word}" for position, word in enumerate(self.words))])
        return "\n".join([tokens, *(f"note: {note}" for note in self.notes)])


def prompt(lens: HookedTransformer, text: str, *, bos: str | None = None) -> Prompt:
    """Tokenize `text` as `lens` reads it.

    Args:
        lens: a model made by `phaselens.load`.
        text: the text of the prompt.
        bos: `"auto"`: as the model's tokenizer does; `"always"` or `"never"`: with or without a BOS token at
            position 0; None: as the model was loaded.

    Raises:
        InputError: for anything but a text, for a text without tokens, or a model without a tokenizer.

    >>> from phaselens.testing import tiny_lens
    >>> prompt(tiny_lens(), "to be").words
    ["'<s>'", "'t'", "'o'", "' '", "'b'", "'e'"]
    """
    require_lens("lens", lens)
    if not isinstance(text, str):
        raise InputError(
            f"expected a prompt as text, received {short_form(text)}; write prompt(model, 'text')"
        )
    if lens.text_tokenizer is None:
        reason = lens.tokenizer_note or "none was found"
        raise InputError(f"model {lens.info.label!r} has no tokenizer for prompts: {reason}")
    encoder = lens.encoder(bos)
    tokens = encoder.tokenize(Text("prompt", text), 1 << 30)
    if reason := lens.info.reason_against(len(tokens.ids)):
        reason = reason.replace("the model", lens.info.label, 1)
        raise InputError(f"the prompt has {len(tokens.ids)} tokens, but {reason}; shorten it")
    return Prompt(lens, text, tokens.ids, encoder.bos, tuple(encoder.notes([tokens])))


def bos_of(clean: Prompt, corrupt: Prompt | None = None) -> str:
    """Return the BOS policy of one or two prompts: `auto`, or if they differ `clean auto, corrupt never`."""
    if corrupt is None or corrupt.bos == clean.bos:
        return clean.bos
    return f"clean {clean.bos}, corrupt {corrupt.bos}"


@dataclass(frozen=True, repr=False)
class Alignment:
    """Two prompts of equal length, token by token."""

    clean: Prompt
    corrupt: Prompt

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions at which the prompts have different tokens."""
        pairs = enumerate(zip(self.clean.ids, self.corrupt.ids, strict=True))
        return tuple(position for position, (clean_id, corrupt_id) in pairs if clean_id != corrupt_id)

    def rows(self) -> Iterator[tuple[int, str, str, bool]]:
        """Yield (position, clean token, corrupt token, whether they differ)."""
        differing = set(self.differing)
        words = zip(self.clean.words, self.corrupt.words, strict=True)
        for position, (clean_word, corrupt_word) in enumerate(words):
            yield position, clean_word, corrupt_word, position in differing

    def __repr__(self) -> str:
        return str(self)

    def to_table(self) -> Table:
        """Return the tokens of both prompts, by position."""
        return _ALIGNMENT_TABLE.build(
            (position, clean, corrupt, "≠" if differs else "=")
            for position, clean, corrupt, differs in self.rows()
        )

    def _repr_html_(self) -> str:
        notes = [
            f"note: {name}: {note}"
            for name, prompt in (("clean", self.clean), ("corrupt", self.corrupt))
            for note in prompt.notes
        ]
        return result_html(f"two prompts of {self.clean.lens.info.label!r}", self.to_table(), notes)

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len("clean"), *(len(clean_word) for _, clean_word, _, _ in rows))
        lines = [f" pos  {'clean':{width}}  corrupt"]
        for position, clean_word, corrupt_word, differs in rows:
            lines.append(f"{position:4}  {clean_word:{width}}  {'≠ ' + corrupt_word if differs else '='}")
        for name, prompt in (("clean", self.clean), ("corrupt", self.corrupt)):
            lines += [f"note: {name}: {note}" for note in prompt.notes]
        return "\n".join(lines)


def align(clean: Prompt, corrupt: Prompt) -> Alignment:
    """Pair two prompts token by token.

    Raises:
        InputError: for prompts of different models or lengths, with the position where they diverge.

    >>> from phaselens.testing import tiny_lens
    >>> lens = tiny_lens()
    >>> align(prompt(lens, "to be"), prompt(lens, "to do")).differing
    (4, 5)
    """
    require_prompt(clean, "clean")
    require_prompt(corrupt, "corrupt")
    if clean.lens is not corrupt.lens:
        raise InputError(
            f"clean is a prompt of {clean.lens.info.label!r} and corrupt of {corrupt.lens.info.label!r}; "
            "make both with one model"
        )
    if len(clean) != len(corrupt):
        raise InputError(_describe_divergence(clean, corrupt))
    return Alignment(clean, corrupt)


def _describe_divergence(clean: Prompt, corrupt: Prompt) -> str:
    """Return a line that says where two prompts of different lengths diverge."""
    clean_ids, corrupt_ids = clean.ids, corrupt.ids
    n_shared = min(len(clean), len(corrupt))
    start = next((i for i in range(n_shared) if clean_ids[i] != corrupt_ids[i]), n_shared)
    n_left = n_shared - start
    n_same_end = next((i for i in range(n_left) if clean_ids[-1 - i] != corrupt_ids[-1 - i]), n_left)

    def describe_excerpt(prompt: Prompt) -> str:
        words = prompt.words[start : len(prompt) - n_same_end]
        excerpt = " ".join(words[:6]) + (" …" if len(words) > 6 else "")
        return f"reads {excerpt}" if words else "has nothing"

    return (
        f"clean has {len(clean)} tokens and corrupt {len(corrupt)}: they diverge at position {start}, where clean "
        f"{describe_excerpt(clean)} and corrupt {describe_excerpt(corrupt)}; use prompts with the same number of tokens"
    )


def require_prompt(candidate: object, name: str) -> Prompt:
    """Return `candidate` if it is a prompt.

    Raises:
        InputError: for anything else, with the call that makes a prompt.
    """
    if not isinstance(candidate, Prompt):
        raise InputError(
            f"{name} is a {type(candidate).__name__}, not a prompt; write {name} = m.prompt('…') in the REPL, "
            "or phaselens.patching.prompt(model, '…')"
        )
    return candidate
