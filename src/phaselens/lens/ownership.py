"""One owner of everything that calls and contexts install on a lens, so that an interrupted one leaves nothing behind.

Ctrl-C can strike at any bytecode, also in a `finally` that would remove a hook. So each call and context notes, before
it changes anything, what the lens was. At the start of the next one, notes whose call no longer runs are those of
interrupted ones, and the lens becomes what it was before them.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phaselens.errors import InputError
from phaselens.lens.lens_state import HookStores, LensState

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

T = TypeVar("T")

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(eq=False)
class Use:
    """A call or context that may change a lens, and the state of the lens before it.

    ``frame`` is that of the call; of a context, that of its `with` statement, or None where that is unknown.
    ``context`` is a weak reference to the context. ``closed`` means that its end has begun.
    """

    thread: int
    before: LensState
    grad_enabled: bool
    frame: FrameType | None
    context: weakref.ref[Any] | None = None
    closed: bool = False

    def is_live(self) -> bool:
        """Return whether the call still runs, or the context is still open."""
        if self.context is None:
            return self.frame is not None and _is_running(self.frame, self.thread)
        if self.closed or self.context() is None:
            return False
        return self.frame is None or _is_running(self.frame, self.thread)


class Ownership:
    """The calls and contexts that use a lens, the outermost first.

    ``generation`` counts the times that the lens was put back after an interrupt.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._uses: list[Use] = []
        self._stores: HookStores | None = None

    def begin(self, lens: HookedTransformer, frame: FrameType | None, context: object = None) -> Use | None:
        """Note a call in `frame`, or a context; None inside a call, which puts everything back itself.

        Raises:
            InputError: while another thread uses the lens.
        """
        if self._uses:
            self._put_back(lens)
            self._require_thread(lens, self._uses)
            if any(use.context is None for use in self._uses):
                return None
        if self._stores is None:
            self._stores = HookStores(lens)
        reference = None if context is None else weakref.ref(context)
        use = Use(
            threading.get_ident(), LensState(lens, self._stores), torch.is_grad_enabled(), frame, reference
        )
        self._uses.append(use)
        before = self._uses[: self._uses.index(use)]
        if before:  # a thread may have begun at the same time
            try:
                self._require_thread(lens, before)
            except InputError:
                self._uses.remove(use)
                raise
        return use

    def end(self, lens: HookedTransformer, use: Use | None) -> None:
        """Forget a call or context that has put everything back.

        A use inside it that was interrupted has not, and what it noted is the lens inside: the lens becomes what it was
        before the outer one.
        """
        if use is None or use not in self._uses:
            return
        inner_uses = self._uses[self._uses.index(use) + 1 :]
        if all(inner.is_live() for inner in inner_uses):
            self._uses.remove(use)
            # The frame holds the use as a variable, and with it the lens and what the call returned.
            use.frame = None
        else:
            self._restore(lens, use)

    def undo(self, lens: HookedTransformer, use: Use | None) -> None:
        """Make the lens what it was before a call that ended with an exception, and forget the call."""
        if use is not None and use in self._uses:
            torch.set_grad_enabled(use.grad_enabled)
            self._restore(lens, use)

    def __deepcopy__(self, memo: object) -> Ownership:
        """Return a new one: the copy of a lens is used by nobody."""
        return Ownership()

    def _put_back(self, lens: HookedTransformer) -> None:
        """Make the lens what it was before the first use that was interrupted."""
        for use in self._uses:
            if not use.is_live():
                self._restore(lens, use)
                self.generation += 1
                return

    def _restore(self, lens: HookedTransformer, use: Use) -> None:
        """Make the lens what it was before a use, and forget it with those inside it."""
        assert self._stores is not None, "made before the first use"
        use.before.restore(lens, self._stores)
        start = self._uses.index(use)
        forgotten = self._uses[start:]
        del self._uses[start:]
        for forgotten_use in forgotten:
            forgotten_use.frame = None  # as in `end`

    def _require_thread(self, lens: HookedTransformer, uses: list[Use]) -> None:
        if any(use.thread != threading.get_ident() for use in uses):
            raise InputError(
                f"{lens.info.label} is in use in another thread, and a lens serves one at a time; load a lens for each "
                "thread"
            )


def _is_running(frame: FrameType, thread: int) -> bool:
    """Return whether a frame is on the stack of a thread."""
    current = sys._getframe() if thread == threading.get_ident() else sys._current_frames().get(thread)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


def _frame_of_with(frame: FrameType) -> FrameType | None:
    """Return the frame if it is at a `with` statement that ends with it; None for other ways to enter a context."""
    code = frame.f_code
    if code.co_flags & _SUSPENDS or frame.f_lasti < 0:
        return None
    return frame if dis.opname[code.co_code[frame.f_lasti]] == "BEFORE_WITH" else None


class OwnedContext:
    """A context on a lens whose changes are undone even if its own end is interrupted.

    Args:
        lens: the lens.
        make_inner: makes the context that changes the lens, each time that this one is entered.
        yields_itself: whether `with … as` gets this object, which can be entered again, instead of the inner one's.
    """

    def __init__(
        self,
        lens: HookedTransformer,
        make_inner: Callable[[], AbstractContextManager[Any]],
        *,
        yields_itself: bool = False,
    ) -> None:
        self._lens = lens
        self._make_inner = make_inner
        self._yields_itself = yields_itself
        self._inner: AbstractContextManager[Any] | None = None
        self._use: Use | None = None

    def __enter__(self) -> Any:
        lens = self._lens
        self._use = lens.ownership.begin(lens, _frame_of_with(sys._getframe(1)), self)
        try:
            self._inner = self._make_inner()
            yielded = self._inner.__enter__()
            return self if self._yields_itself else yielded
        except BaseException:
            lens.ownership.undo(lens, self._use)
            raise

    def __exit__(self, *exception: Any) -> bool | None:
        if self._use is not None:
            self._use.closed = True
        suppressed = None if self._inner is None else self._inner.__exit__(*exception)
        self._lens.ownership.end(self._lens, self._use)
        return suppressed


def owned_call(method: Callable[..., T]) -> Callable[..., T]:
    """Let a method of the lens own what it installs while it runs."""

    @wraps(method)
    def call(self: HookedTransformer, *args: object, **kwargs: object) -> T:
        use = self.ownership.begin(self, sys._getframe())
        try:
            returned = method(self, *args, **kwargs)
        except BaseException:
            self.ownership.undo(self, use)
            raise
        self.ownership.end(self, use)
        return returned

    return call


def owned_context(method: Callable[..., AbstractContextManager[Any]]) -> Callable[..., OwnedContext]:
    """Let the context that a method of the lens returns own what it installs while it is open."""

    @wraps(method)
    def context(self: HookedTransformer, *args: object, **kwargs: object) -> OwnedContext:
        return OwnedContext(self, partial(method, self, *args, **kwargs))

    return context
