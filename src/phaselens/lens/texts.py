"""How a lens turns texts into tokens: one BOS policy for everything of TransformerLens that takes a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from phaselens.data import Encoder
from phaselens.errors import InputError
from phaselens.lens.info import ModelInfo

# Help and completion show the parameters of the method that is extended.
signed_as = partial(wraps, assigned=())


def options_of(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """By name, defaults included, what a call of a bridge's `method` is given beside the bridge and its input."""
    bound = signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    _, _, *names, others = bound.arguments
    return {name: bound.arguments[name] for name in names} | bound.arguments[others]


class ReadsTexts(TransformerBridge):
    """A bridge whose `to_tokens`, and so every method that takes a text, gives the ids that a run measures.

    TransformerLens itself prepends BOS by default, also where the model's tokenizer does not, and marks pads by their
    id, which a BOS token may share.
    """

    info: ModelInfo
    text_tokenizer: Any
    _default_prepend_bos: bool

    @property
    def bos(self) -> str:
        """The BOS policy of every route, as `load` was given it.

        Setting TransformerLens' `cfg.default_prepend_bos` to another value changes it to `always` or `never`.
        """
        prepend = bool(self.cfg.default_prepend_bos)
        if prepend == self._default_prepend_bos:
            return self.info.bos
        return "always" if prepend else "never"

    def encoder(self, bos: str | None = None) -> Encoder:
        """What turns texts into ids, under the lens' own policy or another.

        Raises:
            InputError: for an unknown policy, and for `always` where there is no BOS token.
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
        """Texts as token ids [batch, pos], padded as TransformerLens does.

        Args:
            input: a text, or several.
            prepend_bos: None: by the lens' policy (`bos`), as in a run; True: one BOS token first; False: no special
                token, as for a part of a prompt.
            padding_side: `"right"` or `"left"`; by default that of `tokenizer`.
            move_to_device: whether to put the ids on the model's device.
            truncate: whether to cut texts to the model's n_ctx.

        Raises:
            InputError: for something else than texts, and for a text that has no tokens (unless `prepend_bos` is
                False).

        >>> from phaselens.testing import tiny_lens
        >>> tiny_lens().to_tokens("<s>to be").tolist()
        [[0, 31, 26, 3, 13, 16]]
        """
        if self.text_tokenizer is None:
            tokens: Tensor = super().to_tokens(input, prepend_bos, padding_side, move_to_device, truncate)
            return tokens
        tokens, _ = self._padded(input, prepend_bos, padding_side, truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    @signed_as(TransformerBridge.generate)
    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' `generate`; texts are read by the lens' BOS policy, and only pads are masked."""
        return super().generate(input, *args, **self._with_mask(input, kwargs))

    @signed_as(TransformerBridge.generate_stream)
    def generate_stream(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' `generate_stream`; texts are read as in `generate`."""
        return super().generate_stream(input, *args, **self._with_mask(input, kwargs))

    @signed_as(TransformerBridge.hf_generate)
    def hf_generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' `hf_generate`; texts are read by the lens' BOS policy, and not by the tokenizer alone."""
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

    def _hf_generate(self, input: Any, options: dict[str, Any]) -> Any:
        """`hf_generate` from tokens; from texts where only TransformerLens has a tokenizer."""
        return super().hf_generate(input, **options)

    def _read_padded(self, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Several texts as the ids of a forward with these options: pads on the left are masked in `options`; where
        they are on the right, the second value says how many tokens each text has [batch]."""
        side = self._side(options["padding_side"])
        tokens, mask = self._padded(texts, options["prepend_bos"], side, truncate=True)
        device = self.cfg.device
        if side == "left":
            options["attention_mask"] = mask.to(device)
        return tokens.to(device), None if side == "left" else mask.sum(-1)

    def _are_texts(self, input: Any) -> bool:
        return (
            isinstance(input, list)
            and len(input) > 1
            and self.text_tokenizer is not None
            and all(isinstance(text, str) for text in input)
        )

    def _side(self, padding_side: str | None) -> str:
        return padding_side or getattr(self.tokenizer, "padding_side", None) or "right"

    def _with_mask(self, input: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a generation from several texts, with the mask of their pads."""
        if not self._are_texts(input) or kwargs.get("attention_mask") is not None:
            return kwargs
        _, mask = self._padded(input, kwargs.get("prepend_bos"), "left", truncate=False)
        return {**kwargs, "attention_mask": mask.to(self.cfg.device)}

    def _padded(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None, truncate: bool
    ) -> tuple[Tensor, Tensor]:
        """Ids [batch, pos] and which of them are a text's own, on the CPU."""
        texts: Sequence[Any] = [input] if isinstance(input, str) else input
        if (
            not isinstance(texts, list | tuple)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise InputError(f"expected a text or a list of texts, got {type(input).__name__}: {input!r:.60}")
        encode = self._override(prepend_bos)
        rows = [encode(text)[: self.cfg.n_ctx if truncate else None] for text in texts]
        if prepend_bos is not False and not all(rows):
            empty = texts[[bool(row) for row in rows].index(False)]
            raise InputError(f"text {empty!r} has no tokens (bos: {encode.bos}); give it words")
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

    def _override(self, prepend_bos: bool | None) -> Encoder:
        """The encoder of one call, whose `prepend_bos` goes before the lens' policy."""
        if not prepend_bos:
            return self.encoder(None if prepend_bos is None else "never")
        if self.info.bos_token_id is not None:
            return self.encoder("always")
        # TransformerLens takes the EOS token where there is no BOS token and one is demanded.
        stand_in = getattr(self.tokenizer, "bos_token_id", None)
        return Encoder(self.text_tokenizer, bos="always", bos_token_id=stand_in)
