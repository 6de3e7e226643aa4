"""Tab completion inside a verb's quotes: hook names, kinds, conditions, metrics, verbs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from phaselens.data import BOS_POLICIES
from phaselens.lens.points import HookFunction, is_editable
from phaselens.patching import KINDS, causal_names, metric_names
from phaselens.patching.results import AXES
from phaselens.repl.calls import VERB_NAMES
from phaselens.repl.session import Session

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult

    from phaselens.lens import HookedTransformer

    Matcher = Callable[[CompletionContext], SimpleMatcherResult]

# The innermost open call, and the string that is being typed in it, with the name of its argument if there is one.
_TYPING = re.compile(r"""(\w+)\((?:[^()]*?[,\s])?\s*(?:(\w+)\s*=\s*)?(["'])([^"']*)$""")
_CLOSED = re.compile(r"\([^()]*\)")


def completions(session: Session, text: str) -> tuple[str, list[str]] | None:
    """Return the string being typed at the end of `text`, and its completions; None where there are none."""
    while (shorter := _CLOSED.sub("", text)) != text:
        text = shorter
    match = _TYPING.search(text)
    if match is None:
        return None
    verb, argument, _, typed = match.groups()
    values = _valid_values(session, verb, argument)
    return None if values is None else (typed, [value for value in values if value.startswith(typed)])


def _valid_values(session: Session, verb: str, argument: str | None) -> Iterable[str] | None:
    if argument == "what" or (argument is None and verb in ("sweep", "attribution")):
        return KINDS
    if argument == "by":
        return AXES
    if argument == "value":
        return ("zero", "mean")
    if argument == "bos":
        return BOS_POLICIES
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
def hook_names(lens: HookedTransformer) -> list[str]:
    """Return points that fire in a short run and can be edited, without inner points of TransformerLens' components."""
    import torch

    inner = (".hook_in", ".hook_out")
    names = [name for name in lens.hook_dict if not name.endswith(inner) and is_editable(name)]
    fired: set[str] = set()

    def record_hook(name: str) -> HookFunction:
        return lambda value, hook: fired.add(name) if isinstance(value, torch.Tensor) else None

    lens.stream(torch.zeros((1, 2), dtype=torch.long), [(name, record_hook(name)) for name in names])
    return [name for name in names if name in fired]


def matcher(session: Session) -> Matcher:
    """Return `completions` as a matcher for IPython's completer."""
    from IPython.core import completer

    mark_as_matcher: Callable[[Matcher], Matcher] = completer.context_matcher()

    @mark_as_matcher
    def phaselens_matcher(context: CompletionContext) -> SimpleMatcherResult:
        typed_and_values = completions(session, context.text_until_cursor)
        if typed_and_values is None:
            return {"completions": []}
        typed, values = typed_and_values
        return {
            "completions": [completer.SimpleCompletion(text=value, type="name") for value in values],
            "matched_fragment": typed,
            "suppress": True,
        }

    return phaselens_matcher
