"""One text as a model reads it, and two of them side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import Text
from phaselens.errors import InputError
from phaselens.lens.info import require_lens
from phaselens.patching.points import counted

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


def token_text(lens: HookedTransformer, token: int) -> str:
    """One token as Python writes a string: spaces show, and control characters are spelled out.

    Without a tokenizer it is the token's number.
    """
    if lens.text_tokenizer is None:
        return f"#{token}"
    return repr(lens.text_tokenizer.decode([token], clean_up_tokenization_spaces=False))


@dataclass(frozen=True, repr=False)
class Prompt:
    """A text and the token ids that a model makes of it; made by `prompt`.

    `notes` say where the ids are not simply what the tokenizer gives.
    """

    lens: HookedTransformer
    text: str
    ids: tuple[int, ...]
    bos: str = "auto"
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> Tensor:
        """[1, pos], on the model's device."""
        import torch

        return torch.tensor([self.ids], device=self.lens.device)

    @property
    def words(self) -> list[str]:
        """Each token as text, quoted; see `token_text`."""
        return [token_text(self.lens, token) for token in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = f"{counted(len(self), 'token')} of {self.lens.info.label!r}:"
        tokens = " ".join([head, *(f"{place}{word}" for place, word in enumerate(self.words))])
        return "\n".join([tokens, *(f"note: {note}" for note in self.notes)])


def prompt(lens: HookedTransformer, text: str, *, bos: str | None = None) -> Prompt:
    """`text` as `lens` reads it.

    Args:
        lens: a model made by `phaselens.load`.
        text: what the model is to read.
        bos: `"auto"` as its tokenizer does, `"always"` or `"never"` a BOS token at position 0; None as the model was
            loaded.

    Raises:
        InputError: for no text, no tokens, or a model without a tokenizer.

    >>> from phaselens.testing import tiny_lens
    >>> prompt(tiny_lens(), "to be").words
    ["'<s>'", "'t'", "'o'", "' '", "'b'", "'e'"]
    """
    require_lens("lens", lens)
    if not isinstance(text, str):
        raise InputError(f"a prompt is a text, got {type(text).__name__}; write prompt(model, 'text')")
    if lens.text_tokenizer is None:
        reason = lens.tokenizer_note or "none was found"
        raise InputError(f"model {lens.info.label!r} has no tokenizer for prompts: {reason}")
    encoder = lens.encoder(bos)
    made = encoder.tokens(Text("prompt", text), _longest(lens))
    if made.cut:
        raise InputError(
            f"the prompt has {made.full_length} tokens, but {lens.info.label} has learned positions for "
            f"{lens.info.n_ctx}; shorten it"
        )
    return Prompt(lens, text, made.ids, encoder.bos, tuple(encoder.notes([made])))


def bos_of(clean: Prompt, corrupt: Prompt | None = None) -> str:
    """The BOS policy of one prompt or of two: `auto`, or where they differ `clean auto, corrupt never`."""
    if corrupt is None or corrupt.bos == clean.bos:
        return clean.bos
    return f"clean {clean.bos}, corrupt {corrupt.bos}"


def _longest(lens: HookedTransformer) -> int:
    learned = any("learned" in kind for kind in lens.info.positions)
    return lens.info.n_ctx if learned and lens.info.n_ctx else 1 << 30


@dataclass(frozen=True, repr=False)
class Alignment:
    """Two prompts of equal length, token by token."""

    clean: Prompt
    corrupt: Prompt

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions at which the two have different tokens."""
        pairs = enumerate(zip(self.clean.ids, self.corrupt.ids, strict=True))
        return tuple(place for place, (one, other) in pairs if one != other)

    def rows(self) -> Iterator[tuple[int, str, str, bool]]:
        """(position, clean token, corrupt token, whether they differ)."""
        differing = set(self.differing)
        for place, (one, other) in enumerate(zip(self.clean.words, self.corrupt.words, strict=True)):
            yield place, one, other, place in differing

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len("clean"), *(len(one) for _, one, _, _ in rows))
        lines = [f" pos  {'clean':{width}}  corrupt"]
        for place, one, other, differs in rows:
            lines.append(f"{place:4}  {one:{width}}  {'≠ ' + other if differs else '='}")
        for name, prompt in (("clean", self.clean), ("corrupt", self.corrupt)):
            lines += [f"note: {name}: {note}" for note in prompt.notes]
        return "\n".join(lines)


def align(clean: Prompt, corrupt: Prompt) -> Alignment:
    """The two prompts side by side.

    Raises:
        InputError: where they are of different models or lengths; it shows where they part.

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
        raise InputError(_parting(clean, corrupt))
    return Alignment(clean, corrupt)


def _parting(clean: Prompt, corrupt: Prompt) -> str:
    """Where two prompts of different lengths part, in one line."""
    a, b = clean.ids, corrupt.ids
    shorter = min(len(a), len(b))
    first = next((place for place in range(shorter) if a[place] != b[place]), shorter)
    rest = shorter - first
    last = next((back for back in range(rest) if a[-1 - back] != b[-1 - back]), rest)

    def between(prompt: Prompt) -> str:
        words = prompt.words[first : len(prompt) - last]
        shown = " ".join(words[:6]) + (" …" if len(words) > 6 else "")
        return f"reads {shown}" if words else "has nothing"

    return (
        f"clean has {len(a)} tokens and corrupt {len(b)}: they part at position {first}, where clean {between(clean)} "
        f"and corrupt {between(corrupt)}; choose words of as many tokens"
    )


def require_prompt(candidate: Any, name: str) -> Prompt:
    """`candidate`, if it is a prompt.

    Raises:
        InputError: which says how to make one.
    """
    if not isinstance(candidate, Prompt):
        raise InputError(
            f"{name} is a {type(candidate).__name__}, not a prompt; write {name} = m.prompt('…') in the REPL, "
            "or phaselens.patching.prompt(model, '…')"
        )
    return candidate
