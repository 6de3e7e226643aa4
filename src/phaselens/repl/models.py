"""Models as a session shows them: the lens itself, with `prompt`, a short name, and a call that may be `rope()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phaselens.lens import HookedTransformer
from phaselens.patching import Prompt, prompt


class SessionModel(HookedTransformer):
    """A loaded model, `m`. Everything of TransformerLens' bridge works on it; `m.prompt("…")` reads a text.

    `m.info` says what is known of it, `m.generate("…")` lets it write, `m.describe_hooks()` lists what can be hooked.
    """

    _switch: Callable[[Any], None] | None = None

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
        layers = [*args, *(value for name, value in kwargs.items() if name == "layer")]
        if (
            self._switch is not None
            and len(layers) == len(args) + len(kwargs) < 2
            and all(map(_is_layers, layers))
        ):
            return self._switch(layers[0] if layers else None)
        return super().__call__(*args, **kwargs)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"{info.label}: {info.architecture}, {info.n_layers} layers, {info.n_heads} heads, d_model {info.d_model}, "
            f"positions {info.positions_summary}, {info.dtype} on {info.device}"
        )


def _is_layers(value: Any) -> bool:
    """Layers are whole numbers; what a model is run on is text or a tensor."""
    if value is None or isinstance(value, int | range) or (isinstance(value, str) and value == "all"):
        return True
    return isinstance(value, list | tuple) and all(isinstance(each, int) for each in value)


def adopt(lens: HookedTransformer) -> SessionModel:
    """The same model, of this class."""
    if not isinstance(lens, SessionModel):
        # It adds methods and no state that would have had to be set up.
        lens.__class__ = SessionModel
    assert isinstance(lens, SessionModel)
    return lens
