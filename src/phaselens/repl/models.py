"""`SessionModel`: a loaded model at the prompt, with `prompt` and a short repr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.patching import Prompt, prompt
from phaselens.repl.calls import explain_misuse

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class SessionModel:
    """A loaded model, such as `m`. Every attribute and method of TransformerLens' bridge works on it.

    `m.prompt("…")` tokenizes a text, `m.info` holds the facts of the model, `m.generate("…")` continues a text,
    `m.describe_hooks()` lists the hook points.
    """

    def __init__(self, lens: HookedTransformer) -> None:
        # `inspect.unwrap` reads this attribute. `self.__setattr__` would write to the lens.
        object.__setattr__(self, "__wrapped__", lens)

    @explain_misuse
    def prompt(self, text: str, *, bos: str | None = None) -> Prompt:
        """Tokenize `text` as this model reads it: `clean = m.prompt("Call me Ishmael")`.

        Args:
            text: the text of the prompt.
            bos: `"auto"`: as the model's tokenizer does; `"always"` or `"never"`: with or without a BOS token at
                position 0; None: as the model was loaded (`phaselens repl --bos`).
        """
        return prompt(self.__wrapped__, text, bos=bos)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the model's forward on texts or tokens.

        Raises:
            InputError: for a layer number, which `rope(2)` took in earlier versions.
        """
        if args and isinstance(args[0], int | range):
            raise InputError(
                f"{self.info.label} is a model; call it on a text or tokens, or write "
                f"restore_rope({args[0]}) to restore a rotation"
            )
        return self.__wrapped__(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The lens' class, so that `isinstance` checks of TransformerLens and torch accept the wrapper."""
        return type(self.__wrapped__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that the wrapper does not implement, such as copying
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__wrapped__, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__wrapped__, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self.__wrapped__), "prompt"})

    def __repr__(self) -> str:
        info = self.info
        return (
            f"{info.label}: {info.architecture}, {info.n_layers} layers, {info.n_heads} heads, d_model {info.d_model}, "
            f"positions {info.positions_summary}, {info.dtype} on {info.device}"
        )
