"""Batches of tokenized texts, and the error for a batch that does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phaselens.data import TokenizedText
from phaselens.errors import InputError
from phaselens.plugin import Batch

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class BatchTooLarge(InputError):  # noqa: N818 - named after its cause, as the other errors here
    """A batch does not fit into memory. This ends the run, not only the metric that was running."""


def make_batch(
    lens: HookedTransformer, tokenized_texts: Sequence[TokenizedText], indices: Sequence[int]
) -> Batch:
    """Return the texts at `indices`, padded on the right with token 0, which no real token can see."""
    import torch

    members = [tokenized_texts[index] for index in indices]
    lengths = [len(member.ids) for member in members]
    tokens = torch.zeros(len(members), max(lengths), dtype=torch.long)
    for row, member in enumerate(members):
        tokens[row, : lengths[row]] = torch.tensor(member.ids)
    return Batch(
        tuple(member.text.id for member in members),
        tuple(indices),
        tuple(lengths),
        tokens.to(lens.device),
        _token_namer(lens),
        tuple(member.text.sha256 for member in members),
    )


def _token_namer(lens: HookedTransformer) -> Callable[[int], str]:
    """Return a function from a token id to the tokenizer's name for it, or to its number where it has no name."""
    tokenizer = lens.text_tokenizer

    def token_name(token: int) -> str:
        name = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else str(token)

    return token_name


@contextmanager
def out_of_memory_explained(lens: HookedTransformer, batch: Batch) -> Iterator[None]:
    """Replace an out-of-memory error by one that names the batch and what to change.

    Raises:
        BatchTooLarge: naming the batch.
    """
    from phaselens.lens.memory import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise BatchTooLarge(
                f"{lens.info.label}: a batch of {batch.n} × {batch.tokens.shape[1]} tokens does not fit "
                f"into the memory of {lens.device}; lower --batch-tokens or --max-tokens"
            ) from error
        raise
