"""For tests of metrics and plugins: tiny random models of each family. Nothing is downloaded."""

from phaselens.testing.models import FAMILIES, tiny_model, tiny_tokenizer

__all__ = ["FAMILIES", "tiny_model", "tiny_tokenizer"]
