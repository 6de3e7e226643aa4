"""Read texts, tokenize them, and group them into batches; holds the bundled texts and models."""

from phaselens.data.batching import pack
from phaselens.data.reading import Text, read_texts, texts_from
from phaselens.data.tokens import BOS_POLICIES, Encoder, TokenizedText

__all__ = ["BOS_POLICIES", "Encoder", "Text", "TokenizedText", "pack", "read_texts", "texts_from"]
