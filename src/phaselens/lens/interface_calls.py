"""The calls of transformers' attention interface during a forward: which module made each, and with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class InterfaceCall:
    """One call of the attention interface.

    ``query`` [batch, n_heads, n_queries, d_head], ``key`` [batch, n_kv_heads, n_keys, d_head] and ``value``
    [batch, n_kv_heads, n_keys, d_value] are as the interface received them; ``scale``, ``softcap`` and ``sink_logits``
    [n_heads] are the options of its softmax. ``output`` [batch, n_queries, n_heads, d_value] is what it returned.
    ``selects`` tells whether an indexer selected the keys of each query.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    output: Tensor
    selects: bool = False


_CALLS: ContextVar[list[InterfaceCall] | None] = ContextVar("phaselens_interface_calls", default=None)


def note_call(call: InterfaceCall) -> None:
    """Record a call, while a recorder is active."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append(call)


def is_recording() -> bool:
    """Return whether a recorder is active."""
    return _CALLS.get() is not None


@contextmanager
def recording_calls(calls: list[InterfaceCall]) -> Iterator[None]:
    """Append the calls inside the context to `calls`, in order."""
    token = _CALLS.set(calls)
    try:
        yield
    finally:
        _CALLS.reset(token)
