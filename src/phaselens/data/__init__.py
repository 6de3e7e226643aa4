"""Texts: reading them, making tokens of them, and putting them into batches. Also the bundled texts and
models."""

from phaselens.data.batching import pack
from phaselens.data.reading import Text, read_texts, texts_from
from phaselens.data.tokens import BOS_POLICIES, Encoder, Tokens

__all__ = ["BOS_POLICIES", "Encoder", "Text", "Tokens", "pack", "read_texts", "texts_from"]
