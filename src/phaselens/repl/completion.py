"""What Tab offers inside a verb's quotes: hook names, kinds, conditions, metrics, verbs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from phaselens.lens.points import ALIASES
from phaselens.patching import KINDS, causal_names, metric_names
from phaselens.patching.results import AXES
from phaselens.repl.calls import VERB_NAMES
from phaselens.repl.session import Session

# The innermost open call, and the string that is being typed in it, perhaps for a named argument.
_TYPING = re.compile(r"""(\w+)\((?:[^()]*?[,\s])?\s*(?:(\w+)\s*=\s*)?(["'])([^"']*)$""")
_CLOSED = re.compile(r"\([^()]*\)")
_MEASURED = ("hook_lse", "hook_sink", "hook_entropy", "hook_received", "hook_distance")


def offers(session: Session, text: str) -> tuple[str, list[str]] | None:
    """The string being typed at the end of `text`, and what it could become; None where nothing is known of it."""
    while (shorter := _CLOSED.sub("", text)) != text:
        text = shorter
    found = _TYPING.search(text)
    if found is None:
        return None
    verb, argument, _, typed = found.groups()
    known = _known(session, verb, argument)
    return None if known is None else (typed, [each for each in known if each.startswith(typed)])


def _known(session: Session, verb: str, argument: str | None) -> Iterable[str] | None:
    if argument == "what" or (argument is None and verb in ("sweep", "attribution")):
        return KINDS
    if argument == "by":
        return AXES
    if argument == "value":
        return ("zero", "mean")
    if argument == "bos":
        return ("auto", "always", "never")
    if argument is not None:
        return None
    if verb in ("patch", "ablate", "add_hook"):
        return hook_names(session.lens)
    if verb == "condition":
        return causal_names()
    if verb == "metric":
        return [*metric_names(), "loss"]
    if verb == "guide":
        return [*VERB_NAMES, *session.models]
    return None


@functools.cache
def hook_names(lens: Any) -> list[str]:
    """Points that fire and can be edited, without the inner ones of TransformerLens' parts; found by a short run."""
    import torch

    aliases = [f"blocks.{layer}.{alias}" for layer in range(lens.info.n_layers) for alias in ALIASES]
    inner = (".hook_in", ".hook_out", *_MEASURED)
    names = [name for name in dict.fromkeys([*lens.hook_dict, *aliases]) if not name.endswith(inner)]
    fired: set[str] = set()

    def note(name: str) -> Any:
        return lambda value, hook: fired.add(name) if isinstance(value, torch.Tensor) else None

    lens.stream(torch.zeros((1, 2), dtype=torch.long), [(name, note(name)) for name in names])
    return [name for name in names if name in fired]


def matcher(session: Session) -> Any:
    """The same as one of IPython's matchers."""
    from IPython.core import completer

    def phaselens_matcher(context: Any) -> Any:
        found = offers(session, context.text_until_cursor)
        if found is None:
            return {"completions": []}
        typed, possible = found
        return {
            "completions": [completer.SimpleCompletion(text=each, type="name") for each in possible],
            "matched_fragment": typed,
            "suppress": True,
        }

    marked: Any = completer.context_matcher()
    return marked(phaselens_matcher)
