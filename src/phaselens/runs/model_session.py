"""One model of a run: loaded when it is needed, with the run's texts as its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from phaselens.data import Encoder, Text, TokenizedText
from phaselens.errors import ModelError
from phaselens.runs.inputs import load_model, plugins_of_models
from phaselens.runs.observer import Observer
from phaselens.runs.result import ModelRecord
from phaselens.runs.run_options import ModelSpec, RunOptions

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class ModelSession:
    """A model of a run and the run's texts.

    Args:
        model: a lens, or the name of a model, which is loaded at the first use of `lens`.
        label: the model's label.
        texts: the run's texts.
        options: the run's options.
        observer: learns when the model is loaded.
    """

    def __init__(
        self,
        model: ModelSpec | HookedTransformer,
        label: str,
        texts: Sequence[Text],
        options: RunOptions,
        observer: Observer,
    ) -> None:
        self.model = model
        self.label = label
        self.texts = texts
        self._options = options
        self.observer = observer

    @cached_property
    def lens(self) -> HookedTransformer:
        """The loaded model, with a tokenizer."""
        lens = self._load(self.model) if isinstance(self.model, ModelSpec) else self.model
        if lens.text_tokenizer is None:
            reason = lens.tokenizer_note or "none was found"
            raise ModelError(f"model {self.label!r} has no tokenizer for the texts: {reason}")
        return lens

    @property
    def is_of_plugin(self) -> bool:
        """Whether a plugin offers the model."""
        return isinstance(self.model, ModelSpec) and bool(plugins_of_models([self.model]))

    def _load(self, spec: ModelSpec) -> HookedTransformer:
        self.observer.loading(self.label)
        return load_model(
            spec,
            label=self.label,
            positions=self._options.positions.get(self.label, "auto"),
            bos=self._options.bos or "auto",
            device=self._options.device,
            dtype=self._options.dtype,
            adapter_scale=self._options.adapter_scale_of(self.label, spec),
            softmax_scale=self._options.softmax_scale.get(self.label),
            rope_scaling=self._options.rope_scaling.get(self.label),
            device_map=self._options.device_map,
        )

    @cached_property
    def _encoder(self) -> Encoder:
        return self.lens.encoder(self._options.bos)

    def encoder_of_documents(self) -> Encoder:
        """Return what turns documents into this model's tokens; a model that is named by text is not loaded for it."""
        if not isinstance(self.model, ModelSpec) or self.is_of_plugin:
            return self._encoder
        from phaselens.lens.tokenizer_files import load_own_tokenizer

        tokenizer, reason = load_own_tokenizer(self.model.identified)
        if tokenizer is None:
            raise ModelError(f"model {self.label!r} has no tokenizer for the texts: {reason}")
        return Encoder(tokenizer, bos=self._options.bos or "auto")

    @property
    def bos(self) -> str:
        """The BOS policy of the texts."""
        return self._encoder.bos

    @cached_property
    def tokenized_texts(self) -> list[TokenizedText]:
        """The texts as tokens of this model."""
        return [self._encoder.tokenize(text, self._options.max_tokens) for text in self.texts]

    def release(self) -> None:
        """Let go of the model and its tokens; a later use loads them again."""
        for name in ("lens", "_encoder", "tokenized_texts"):
            vars(self).pop(name, None)

    def record(self) -> ModelRecord:
        """Return the model's facts, and how its texts begin."""
        first_ids = {tokenized.ids[0] for tokenized in self.tokenized_texts}
        first_id = first_ids.pop() if len(first_ids) == 1 else None
        starts_with_bos = first_id is not None and first_id == self.lens.info.bos_token_id
        n_tokens = sum(len(tokenized.ids) for tokenized in self.tokenized_texts)
        return ModelRecord(self.lens.info, self.bos, first_id, starts_with_bos, n_tokens)

    def warnings(self) -> list[str]:
        """Return warnings about the model's texts that a reader of its numbers needs."""
        label, model = self.label, self.record()
        warnings = [f"{label}: {model.info.note}"] if model.info.note is not None else []
        warnings += [f"{label}: {note}" for note in self._encoder.notes(self.tokenized_texts)]
        if not model.starts_with_bos:
            reason = "it has no BOS token" if model.info.bos_token_id is None else "texts got no BOS token"
            warnings.append(f"{label}: {reason}: position 0 is a text's own first token (bos: {model.bos})")
        n_cut = sum(tokenized.cut for tokenized in self.tokenized_texts)
        if n_cut:
            n_texts, max_tokens = len(self.tokenized_texts), self._options.max_tokens
            warnings.append(f"{label}: {n_cut} of {n_texts} texts were cut to {max_tokens} tokens")
        longest, n_ctx = max(len(tokenized.ids) for tokenized in self.tokenized_texts), model.info.n_ctx
        if n_ctx is not None and longest > n_ctx:
            warnings.append(f"{label}: texts of up to {longest} tokens, but the model was made for {n_ctx}")
        return warnings
