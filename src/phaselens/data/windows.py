"""Cut long documents into windows of a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phaselens.data.text import Text
from phaselens.errors import InputError, require_whole

if TYPE_CHECKING:
    from phaselens.data.tokens import Encoder


@dataclass(frozen=True)
class Windows:
    """How documents are cut: windows of `size` tokens, those that the model's encoder adds included, which begin
    `stride` tokens apart; without a stride, each begins where the one before it ends."""

    size: int
    stride: int | None = None

    def __post_init__(self) -> None:
        require_whole("size of a window", self.size, 1)
        if self.stride is not None:
            require_whole("stride of windows", self.stride, 1)

    def cut(self, texts: Sequence[Text], encoder: Encoder) -> list[Text]:
        """Return the windows of all texts, with ids `ID#0`, `ID#1`, …; a text that fits into one keeps its id.

        Windows are texts of their own, cut at the borders of tokens: a model with another tokenizer reads the
        same characters. A word cut in two can be tokenized otherwise at the border.

        Raises:
            InputError: for a tokenizer that does not say which characters its tokens come from, or a window without
                room for a token of the text.
        """
        room = self.size - len(encoder.prefix_ids)
        if room < 1:
            raise InputError(
                f"window of {self.size} tokens: {len(encoder.prefix_ids)} are added before each text; use a larger one"
            )
        return [window for text in texts for window in self._windows_of(text, encoder, room)]

    def _windows_of(self, text: Text, encoder: Encoder, room: int) -> Iterator[Text]:
        spans = encoder.character_spans(text.text)
        if len(spans) <= room:
            yield text
            return
        start, number = 0, 0
        while True:
            end = min(start + room, len(spans))
            # From the end of the token before, so that no character between two tokens is lost.
            first = spans[start - 1][1] if start else 0
            last = spans[end - 1][1] if end < len(spans) else len(text.text)
            window = text.text[first:last]
            # Tokens of one character share its span, and may fill a window between them.
            if window.strip():
                yield Text(f"{text.id}#{number}", window, text.label)
                number += 1
            start += self.stride or room
            if end == len(spans) or start >= len(spans):
                return
