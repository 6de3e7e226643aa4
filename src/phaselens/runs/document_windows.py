"""The documents of a run, cut into windows of tokens of its first model."""

from __future__ import annotations

from collections.abc import Sequence

from phaselens.data import Corpus, Text, Windows
from phaselens.errors import InputError
from phaselens.runs.model_session import ModelSession
from phaselens.runs.run_options import RunOptions


def cut_documents(corpus: Corpus, sessions: Sequence[ModelSession], options: RunOptions) -> Corpus:
    """Return the windows as texts, with a note; the same corpus without `--window`. The sessions read the windows.

    All models read the same characters: those that are `window` tokens of the first one.

    Raises:
        InputError: for a tokenizer that cannot cut, and for windows with the id of another text.
        ModelError: for a first model without a tokenizer.
    """
    if options.window is None:
        return corpus
    first = sessions[0]
    texts = Windows(options.window, options.stride).cut(corpus.texts, first.encoder_of_documents())
    _require_distinct_ids(texts)
    for session in sessions:
        session.texts = texts
    n_whole = len({text.id for text in corpus.texts} & {text.id for text in texts})
    n_cut = len(corpus.texts) - n_whole
    if not n_cut:
        return Corpus(texts, corpus.notes)
    stride = f", {options.stride} apart" if options.stride is not None else ""
    by_tokenizer = f" by the tokenizer of {first.label}" if len(sessions) > 1 else ""
    documents = "1 document was" if n_cut == 1 else f"{n_cut:,} documents were"
    windows = f"{len(texts) - n_whole:,} windows of up to {options.window} tokens{stride}"
    note = f"{documents} cut into {windows}{by_tokenizer}; each counts as a text, also in intervals"
    return Corpus(texts, [*corpus.notes, note])


def _require_distinct_ids(texts: Sequence[Text]) -> None:
    ids: set[str] = set()
    for text in texts:
        if text.id in ids:
            raise InputError(f"a window and a text have the id {text.id!r}; give texts ids without #NUMBER")
        ids.add(text.id)
