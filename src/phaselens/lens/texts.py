"""Tokenisation of texts by a lens: one BOS policy for every method of TransformerLens that takes a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from phaselens.data import Encoder
from phaselens.errors import InputError, require_flag, short_form
from phaselens.lens.info import ModelInfo
from phaselens.lens.ownership import owned_call

signed_as = partial(wraps, assigned=())
"""Decorator that gives an extended method the signature of the original, for help and completion."""


def options_of(method: Callable[..., object], /, *args: object, **kwargs: object) -> dict[str, Any]:
    """Return a call's arguments to a bridge's `method` by name, with defaults, without the bridge and its input."""
    bound = signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    _, _, *names, keywords = bound.arguments
    return {name: bound.arguments[name] for name in names} | bound.arguments[keywords]


class ReadsTexts(TransformerBridge):
    """A bridge whose `to_tokens`, and so every method that takes a text, returns the ids that a run measures.

    TransformerLens itself prepends BOS by default, even for models whose tokenizer does not, and recognises pads by
    their id, which a BOS token may share.
    """

    info: ModelInfo
    text_tokenizer: PreTrainedTokenizerBase | None
    _default_prepend_bos: bool

    @property
    def bos(self) -> str:
        """The BOS policy of every method, as it was passed to `load`.

        Setting TransformerLens' `cfg.default_prepend_bos` to another value changes it to `always` or `never`.
        """
        prepend = bool(self.cfg.default_prepend_bos)
        if prepend == self._default_prepend_bos:
            return self.info.bos
        return "always" if prepend else "never"

    def encoder(self, bos: str | None = None) -> Encoder:
        """Return the encoder that turns texts into ids, under the lens' own policy or another.

        Raises:
            InputError: for an unknown policy, and for `always` if there is no BOS token.
        """
        return Encoder(
            self.text_tokenizer,
            bos=self.bos if bos is None else bos,
            bos_token_id=self.info.bos_token_id,
        )

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Tokenise texts to ids [batch, pos], padded as TransformerLens does.

        Args:
            input: a text, or a list of texts.
            prepend_bos: None: by the lens' policy (`bos`), as in a run; True: one BOS token first; False: no special
                token, for a part of a prompt.
            padding_side: `"right"` or `"left"`; by default that of `tokenizer`.
            move_to_device: whether to put the ids on the model's device.
            truncate: whether to cut texts to the model's n_ctx.

        Raises:
            InputError: for anything but texts, and for a text without tokens (unless `prepend_bos` is False).

        >>> from phaselens.testing import tiny_lens
        >>> tiny_lens().to_tokens("<s>to be").tolist()
        [[0, 31, 26, 3, 13, 16]]
        """
        if self.text_tokenizer is None:
            tokens: Tensor = super().to_tokens(input, prepend_bos, padding_side, move_to_device, truncate)
            return tokens
        tokens, _ = self._padded(input, prepend_bos, padding_side, truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    @owned_call
    @signed_as(TransformerBridge.generate)
    def generate(self, input: str | list[str] | Tensor = "", *args: object, **kwargs: object) -> Any:
        """Run TransformerLens' `generate`; texts are tokenised by the lens' BOS policy, and only pads are masked."""
        return super().generate(input, *args, **self._with_mask(input, kwargs))

    @signed_as(TransformerBridge.generate_stream)
    def generate_stream(self, input: str | list[str] | Tensor = "", *args: object, **kwargs: object) -> Any:
        """Run TransformerLens' `generate_stream`; texts are tokenised as in `generate`."""
        return super().generate_stream(input, *args, **self._with_mask(input, kwargs))

    @owned_call
    @signed_as(TransformerBridge.hf_generate)
    def hf_generate(self, input: str | list[str] | Tensor = "", *args: object, **kwargs: object) -> Any:
        """Run TransformerLens' `hf_generate`; texts are tokenised by the lens' BOS policy, not the tokenizer's."""
        options = options_of(TransformerBridge.hf_generate, self, input, *args, **kwargs)
        if isinstance(input, Tensor) or self.text_tokenizer is None:
            return self._hf_generate(input, options)
        tokens, mask = self._padded(input, None, "left", truncate=False)
        device = self.cfg.device
        options.setdefault("attention_mask", mask.to(device))
        output = self._hf_generate(tokens.to(device), {**options, "return_type": "tokens"})
        if options["return_type"] == "tokens":
            return output
        rows = [
            self.tokenizer.decode(row, skip_special_tokens=True)
            for row in getattr(output, "sequences", output)
        ]
        return rows[0] if isinstance(input, str) else rows

    def _hf_generate(self, input: str | list[str] | Tensor, options: dict[str, Any]) -> Any:
        """Run `hf_generate` from tokens, or from texts if only TransformerLens has a tokenizer."""
        return super().hf_generate(input, **options)

    def _padded_inputs(self, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the ids of several texts for a forward with these options, and the number of tokens of each text
        [batch].

        If the pads are on the left, they are masked in `options` instead, and the second value is None.
        """
        side = self._side(options["padding_side"])
        tokens, mask = self._padded(texts, options["prepend_bos"], side, truncate=True)
        device = self.cfg.device
        if side == "left":
            options["attention_mask"] = mask.to(device)
        return tokens.to(device), None if side == "left" else mask.sum(-1)

    def _are_texts(self, input: object) -> TypeGuard[list[str]]:
        return (
            isinstance(input, list)
            and len(input) > 1
            and self.text_tokenizer is not None
            and all(isinstance(text, str) for text in input)
        )

    def _side(self, padding_side: str | None) -> str:
        return padding_side or getattr(self.tokenizer, "padding_side", None) or "right"

    def _with_mask(self, input: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a generation from several texts, with the mask of their pads."""
        if not self._are_texts(input) or kwargs.get("attention_mask") is not None:
            return kwargs
        _, mask = self._padded(input, kwargs.get("prepend_bos"), "left", truncate=False)
        return {**kwargs, "attention_mask": mask.to(self.cfg.device)}

    def _padded(
        self, input: object, prepend_bos: bool | None, padding_side: str | None, truncate: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokenise to ids [batch, pos], and a mask with 1 for real tokens and 0 for pads, on the CPU."""
        texts = [input] if isinstance(input, str) else input
        if (
            not isinstance(texts, list | tuple)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise InputError(
                f"expected a text or a list of texts, received {type(input).__name__}: {input!r:.60}"
            )
        if prepend_bos is not None:
            require_flag("prepend_bos", prepend_bos)
        if padding_side not in (None, "left", "right"):
            raise InputError(f"padding_side is {short_form(padding_side)}; give 'left' or 'right'")
        encode = self._encoder_for(prepend_bos)
        rows = [encode(text)[: self.cfg.n_ctx if truncate else None] for text in texts]
        if prepend_bos is not False and not all(rows):
            empty_text = texts[[bool(row) for row in rows].index(False)]
            raise InputError(f"text {empty_text!r} has no tokens (bos: {encode.bos}); give it words")
        side = self._side(padding_side)
        width = max(map(len, rows))
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        tokens = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            start = width - len(row) if side == "left" else 0
            tokens[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, start : start + len(row)] = 1
        return tokens, mask

    def _encoder_for(self, prepend_bos: bool | None) -> Encoder:
        """Return the encoder of one call, whose `prepend_bos` overrides the lens' policy."""
        if not prepend_bos:
            return self.encoder(None if prepend_bos is None else "never")
        if self.info.bos_token_id is not None:
            return self.encoder("always")
        # TransformerLens uses the EOS token if a BOS token is required and there is none.
        substitute = getattr(self.tokenizer, "bos_token_id", None)
        return Encoder(self.text_tokenizer, bos="always", bos_token_id=substitute)
