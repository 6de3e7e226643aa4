"""Models as a session shows them: the lens itself, with `prompt`, a short name, and a call that may be `rope()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phaselens.lens import HookedTransformer
from phaselens.patching import Prompt, prompt
from phaselens.repl.calls import in_words


class SessionModel(HookedTransformer):
    """A loaded model, `m`. Everything of TransformerLens' bridge works on it; `m.prompt("…")` reads a text.

    `m.info` says what is known of it, `m.generate("…")` lets it write, `m.describe_hooks()` lists what can be hooked.
    """

    _switch: Callable[..., None] | None = None

    @in_words
    def prompt(self, text: str, *, bos: str | None = None) -> Prompt:
        """`text` as this model reads it: `clean = m.prompt("Call me Ishmael")`.

        Args:
            text: what the model is to read.
            bos: `"auto"` as its tokenizer does, `"always"` or `"never"` a BOS token at position 0; None as the model
                was loaded (`phaselens repl --bos`).
        """
        return prompt(self, text, bos=bos)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, of text or tokens. A model that is called `rope` is also the verb `rope(layer=None)`."""
        if self._switch is not None and not _runs_a_model(args, kwargs):
            return self._switch(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"{info.label}: {info.architecture}, {info.n_layers} layers, {info.n_heads} heads, d_model {info.d_model}, "
            f"positions {info.positions_summary}, {info.dtype} on {info.device}"
        )


def _runs_a_model(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has what a model is run on, a text, texts or a tensor; `rope` takes numbers."""
    import torch

    if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        return True
    text = args[0] if args else kwargs.get("input")
    if isinstance(text, list | tuple):
        return any(isinstance(entry, str) for entry in text)
    return isinstance(text, str) and text != "all"


def adopt(lens: HookedTransformer) -> SessionModel:
    """The same model, of this class."""
    if not isinstance(lens, SessionModel):
        # It adds methods and no state that would have had to be set up.
        lens.__class__ = SessionModel
    assert isinstance(lens, SessionModel)
    return lens
