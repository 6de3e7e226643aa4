"""Read texts, tokenize them, and group them into batches; holds the bundled texts and models."""

from phaselens.data.batching import pack
from phaselens.data.reading import Corpus, corpus_from, read_corpus, read_texts, texts_from
from phaselens.data.text import Text, TextFields
from phaselens.data.tokens import BOS_POLICIES, Encoder, TokenizedText
from phaselens.data.windows import Windows

__all__ = [
    "BOS_POLICIES",
    "Corpus",
    "Encoder",
    "Text",
    "TextFields",
    "TokenizedText",
    "Windows",
    "corpus_from",
    "pack",
    "read_corpus",
    "read_texts",
    "texts_from",
]
