"""A forward of a model, recorded at the boundaries of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phaselens.lens.interface_calls import InterfaceCall, recording_calls


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: the first floating tensors among its arguments and in its result.

    ``began`` and ``ended`` count the boundaries of modules since the forward began. ``attention`` are the calls of the
    attention interface inside, ``n_arguments`` the number of arguments. ``attends`` tells, in calls that
    `noting_attention` saw, whether a softmax over keys was computed inside.
    """

    path: str
    module: nn.Module
    began: int
    ended: int = -1
    input: Tensor | None = None
    output: Tensor | None = None
    result: Any = None
    attention: tuple[InterfaceCall, ...] = ()
    n_arguments: int = 0
    attends: bool = False


def first_tensor(values: object) -> Tensor | None:
    """Return the first floating tensor in a result or in arguments; None without one."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, tuple | list):
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    return None


def with_first_tensor(values: Any, replacement: Tensor) -> Any:
    """Return a tensor, tuple or list of arguments or results with its first floating tensor replaced."""
    if isinstance(values, Tensor):
        return replacement
    items = list(values)
    index = next(
        index for index, value in enumerate(items) if isinstance(value, Tensor) and value.is_floating_point()
    )
    items[index] = replacement
    return type(values)(items) if isinstance(values, list) else tuple(items)


#: Given a module's name and the tensor at its boundary, returns the tensor to put in its place, or None to keep it.
Substitute = Callable[[str, Tensor], "Tensor | None"]


@contextmanager
def recording_modules(
    modules: Mapping[str, nn.Module],
    *,
    on_input: Substitute | None = None,
    on_output: Substitute | None = None,
    interface_calls: list[InterfaceCall] | None = None,
) -> Iterator[list[ModuleCall]]:
    """Yield a list of the calls of `modules` inside the context, in the order in which they begin.

    `on_input` and `on_output` may replace the first tensor that enters or leaves a module. The calls then hold the
    tensor that entered the module, and the one that it computed. Calls of the attention interface are appended to
    `interface_calls`.
    """
    calls: list[ModuleCall] = []
    running: list[tuple[ModuleCall, int]] = []
    attention_calls = [] if interface_calls is None else interface_calls
    boundary = 0
    names = {id(module): name for name, module in modules.items()}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal boundary
        call = ModuleCall(names[id(module)], module, boundary)
        boundary += 1
        calls.append(call)
        running.append((call, len(attention_calls)))
        call.n_arguments = len(args) + len(kwargs)
        source: Any = args
        tensor = first_tensor(args)
        if tensor is None:
            source, tensor = kwargs, first_tensor(kwargs)
        if tensor is None:
            return None
        replacement = None if on_input is None else on_input(call.path, tensor)
        call.input = (tensor if replacement is None else replacement).detach().clone()
        if replacement is None:
            return None
        if source is args:
            return with_first_tensor(args, replacement), kwargs
        name = next(name for name, value in kwargs.items() if value is tensor)
        return args, {**kwargs, name: replacement}

    def end(module: nn.Module, _args: object, result: Any) -> Any:
        nonlocal boundary
        call, n_calls_before = running.pop()
        call.ended, call.result = boundary, result
        call.attention = tuple(attention_calls[n_calls_before:])
        boundary += 1
        tensor = first_tensor(result)
        if tensor is None:
            return None
        call.output = tensor.detach().clone()
        replacement = None if on_output is None else on_output(call.path, tensor)
        if replacement is None or isinstance(result, Mapping):
            return None
        return with_first_tensor(result, replacement)

    handles = []
    for module in modules.values():
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end))
    try:
        with torch.no_grad(), recording_calls(attention_calls):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


class _AttentionNoter(TorchDispatchMode):
    """Marks the running calls while a matrix [..., query, key] goes through a softmax, or a fused kernel attends."""

    def __init__(self, calls: list[ModuleCall], n_tokens: int) -> None:
        super().__init__()
        self._calls = calls
        self._n_tokens = n_tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "attention" in name or ("softmax" in name and self._is_matrix(args)):
            for call in self._calls:
                call.attends = call.attends or call.ended < 0
        return func(*args, **(kwargs or {}))

    def _is_matrix(self, args: tuple[Any, ...]) -> bool:
        scores = args[0]
        sizes = (self._n_tokens, self._n_tokens)
        return isinstance(scores, Tensor) and scores.dim() >= 3 and tuple(scores.shape[-2:]) == sizes


def noting_attention(calls: list[ModuleCall], n_tokens: int) -> _AttentionNoter:
    """Return a context that notes which of the running `calls` attend, in a forward of one text of `n_tokens`."""
    return _AttentionNoter(calls, n_tokens)


def pass_on(_module: object, inputs: tuple[Any, ...], output: object) -> Any:
    """Replace what a module returns by its input, if it has the same shape; a forward hook."""
    if isinstance(output, Tensor):
        return inputs[0] if output.shape == inputs[0].shape else None
    return inputs if isinstance(output, tuple) and len(output) == len(inputs) else None
