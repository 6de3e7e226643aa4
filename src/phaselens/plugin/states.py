"""State as a tree of plain values: take it from an object, put it back into a fresh one, and compare two states.

A tree consists of None, bool, int, float, str, lists, tuples, sets, dicts (with keys of str, int or tuples of them),
NumPy arrays, tensors on the CPU, random generators, and of dataclasses and NamedTuples that hold such values. An object
with the methods `state` and `load_state` is in the tree as a `NestedState`, and restores itself.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol, TypeGuard, runtime_checkable

from phaselens.errors import require_kind
from phaselens.plugin.author_errors import author_error, describe_value
from phaselens.plugin.warning import MetricWarning

#: Bit generators of NumPy that a state may hold.
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
#: Names of NumPy's dtypes that a state may hold, besides text.
ARRAY_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip

_SCALARS = (type(None), bool, int, float, str, MetricWarning)
_DICTS = (dict, defaultdict, Counter, OrderedDict)
_ADVICE = (
    "keep values such as numbers, text, lists, dicts, arrays and dataclasses in attributes; leave out by __getstate__ "
    "what can be made again"
)


class NestedState(dict[str, Any]):
    """State of an object inside another one; `load_state` of that object restores it."""


@runtime_checkable
class Stateful(Protocol):
    """An object that returns its state as plain values, and restores it."""

    def state(self) -> dict[str, Any]:
        """Return the state as plain values."""

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Restore a state that an object of this class returned."""


def attributes_to_store(owner: object) -> dict[str, Any]:
    """Return the attributes of an object that `__getstate__` leaves in, by name."""
    attributes = owner.__getstate__()
    if attributes is None:
        return {}
    if (
        isinstance(attributes, tuple) and len(attributes) == 2
    ):  # attributes in __dict__, and those in __slots__
        attributes = {**(attributes[0] or {}), **(attributes[1] or {})}
    if not isinstance(attributes, dict):
        raise author_error(
            f"{type(owner).__name__}.__getstate__ returned {describe_value(attributes)}; return a dict of attributes, "
            "or define state() and load_state()"
        )
    return attributes


def plain_copy(value: Any, name: str, parents: tuple[int, ...] = ()) -> Any:
    """Return a copy of a value as it is in a state.

    Args:
        value: the value.
        name: the value's name in messages, such as `MyMetric.counts`.
        parents: ids of the values that contain this one.

    Raises:
        TypeError: for a value that a state cannot hold; names it.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if id(value) in parents:
        raise _unstorable(name, "contains itself")
    inside = (*parents, id(value))
    if kind in _DICTS:
        return {
            _plain_key(key, name): plain_copy(entry, f"{name}[{key!r}]", inside)
            for key, entry in value.items()
        }
    if kind in (list, tuple):
        return kind(plain_copy(entry, f"{name}[{index}]", inside) for index, entry in enumerate(value))
    if kind in (set, frozenset):
        return kind(_plain_key(entry, name) for entry in value)
    duplicate = _copied_leaf(value, name)
    if duplicate is not None:
        return duplicate
    if isinstance(value, Stateful) and not isinstance(value, type):
        nested = value.state()
        if not isinstance(nested, dict):
            raise _unstorable(f"{name}.state()", f"returned {describe_value(nested)} instead of a dict")
        return NestedState({key: plain_copy(entry, f"{name}.{key}", inside) for key, entry in nested.items()})
    if kind is NestedState:
        return NestedState({key: plain_copy(entry, f"{name}.{key}", inside) for key, entry in value.items()})
    if is_named_tuple(value):
        _require_findable(kind, name)
        entries = (plain_copy(getattr(value, field), f"{name}.{field}", inside) for field in kind._fields)
        return tuple.__new__(kind, entries)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain_dataclass(value, name, inside)
    raise _unstorable(name, f"is {describe_value(value)}")


def is_named_tuple(value: object) -> TypeGuard[Any]:
    """Return whether `value` is an instance of a NamedTuple."""
    return isinstance(value, tuple) and isinstance(getattr(type(value), "_fields", None), tuple)


def find_class(module: str, qualified_name: str) -> Any:
    """Return the class of that name in a module that is imported already; None without one. Nothing is imported."""
    target: Any = sys.modules.get(module)
    for part in qualified_name.split("."):
        target = getattr(target, part, None)
    return target if isinstance(target, type) else None


def build_dataclass(kind: type, values: Mapping[str, Any]) -> Any:
    """Create an instance of a dataclass with these fields, without running its code."""
    instance: Any = object.__new__(kind)
    for field, value in values.items():
        object.__setattr__(instance, field, value)
    return instance


def _plain_dataclass(value: Any, name: str, inside: tuple[int, ...]) -> Any:
    kind = type(value)
    _require_findable(kind, name)
    names = [field.name for field in fields(value)]
    for attribute in getattr(value, "__dict__", {}):
        if attribute not in names and not isinstance(getattr(kind, attribute, None), cached_property):
            raise _unstorable(name, f"has an attribute {attribute!r} that is not one of its fields")
    values = {field: plain_copy(getattr(value, field), f"{name}.{field}", inside) for field in names}
    try:
        return build_dataclass(kind, values)
    except TypeError:
        raise _unstorable(name, f"is a {kind.__name__}, a dataclass that extends a built-in type") from None


def _require_findable(kind: type, name: str) -> None:
    if find_class(kind.__module__, kind.__qualname__) is not kind:
        raise _unstorable(
            name, f"is a {kind.__qualname__}, which is not at the top level of the module {kind.__module__}"
        )


def _plain_key(key: Any, name: str) -> Any:
    """Return a key of a dict or an element of a set; a number of NumPy becomes the equal one of Python."""
    if type(key) in _SCALARS:
        return key
    if type(key) is tuple:
        return tuple(_plain_key(entry, name) for entry in key)
    if type(key).__module__ == "numpy" and hasattr(key, "item") and type(key.item()) in _SCALARS:
        return key.item()
    raise _unstorable(name, f"has the key {key!r}; keys are text, numbers, or tuples of them, and it")


def _copied_leaf(value: Any, name: str) -> Any:
    """Return a copy of an array, a tensor or a random generator; None for any other value."""
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return _copied_array(value, name)
    if module == "torch":
        return _copied_tensor(value, name)
    if type(value) is random.Random:
        return copy.copy(value)
    return None


def _copied_array(value: Any, name: str) -> Any:
    import numpy as np

    if isinstance(value, np.random.Generator):
        if type(value.bit_generator).__name__ not in BIT_GENERATORS:
            raise _unstorable(name, f"is a generator of {type(value.bit_generator).__name__}")
        return copy.deepcopy(value)
    if not isinstance(value, np.generic) and type(value) is not np.ndarray:
        return None
    if value.dtype.name not in ARRAY_DTYPES and value.dtype.kind != "U":
        raise _unstorable(name, f"is an array of {value.dtype}")
    return value if isinstance(value, np.generic) else value.copy(order="K")


def _copied_tensor(value: Any, name: str) -> Any:
    import torch

    if isinstance(value, torch.Generator):
        if value.device.type != "cpu":
            raise _unstorable(name, f"is a generator on {value.device}, not on the CPU")
        return value.clone_state()
    if not isinstance(value, torch.Tensor):
        return None
    if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
        raise _unstorable(
            name, f"is a tensor on {value.device} ({value.layout}); a state holds dense ones on the CPU"
        )
    return value.detach().clone()


def _unstorable(name: str, problem: str) -> Exception:
    return author_error(f"{name} {problem}, which a state cannot hold; {_ADVICE}")


def restored(value: Any, template: Any = None) -> Any:
    """Return a copy of `value` from a state, for the attribute that now holds `template`.

    An object with a method `load_state` restores a NestedState itself; a defaultdict stays one.
    """
    if isinstance(value, NestedState):
        require_kind("template", template, Stateful, "for the state of an object; create it in setup()")
        template.load_state(value)
        return template
    kind = type(value)
    if kind is dict:
        return _restored_dict(value, template)
    if kind is list or kind is tuple:
        templates = template if isinstance(template, list | tuple) and len(template) == len(value) else None
        return kind(
            restored(entry, None if templates is None else templates[index])
            for index, entry in enumerate(value)
        )
    if kind in (set, frozenset):
        return kind(value)
    if is_named_tuple(value):
        return tuple.__new__(kind, map(restored, value))
    if is_dataclass(value) and not isinstance(value, type):
        values = {
            field.name: restored(getattr(value, field.name), getattr(template, field.name, None))
            for field in fields(value)
        }
        return build_dataclass(kind, values)
    return value if kind in _SCALARS else _copied_leaf(value, "the state")


def _restored_dict(value: dict[Any, Any], template: Any) -> dict[Any, Any]:
    target: dict[Any, Any] = {}
    if type(template) in _DICTS:
        target = copy.copy(template)
        target.clear()
    factory = template.default_factory if isinstance(template, defaultdict) else None
    for key, entry in value.items():
        entry_template = template.get(key) if isinstance(template, dict) else None
        if entry_template is None and factory is not None:
            entry_template = factory()
        target[key] = restored(entry, entry_template)
    return target


def changes(state: Mapping[str, Any], base: Mapping[str, Any]) -> NestedState:
    """Return the entries of `state` that differ from those of `base`, in nested states too."""
    changed = NestedState()
    for key, value in state.items():
        before = base.get(key)
        if isinstance(value, NestedState) and isinstance(before, NestedState):
            nested = changes(value, before)
            if nested:
                changed[key] = nested
        elif key not in base or not same_value(value, before):
            changed[key] = value
    return changed


def overlaid(base: Mapping[str, Any], changed: Mapping[str, Any]) -> NestedState:
    """Return `base` with the changes that `changes` returned."""
    state = NestedState(base)
    for key, value in changed.items():
        before = state.get(key)
        is_nested = isinstance(value, NestedState) and isinstance(before, NestedState)
        state[key] = overlaid(before, value) if is_nested else value  # type: ignore[arg-type]
    return state


def same_value(value: Any, twin: Any) -> bool:
    """Return whether two values of states are equal to the bit; NaN equals NaN, and 1, 1.0 and True differ."""
    if type(value) is not type(twin):
        return False
    if isinstance(value, dict):
        # The order counts too: tables are often made in the order of a dict.
        return list(value) == list(twin) and all(same_value(value[key], twin[key]) for key in value)
    if isinstance(value, MetricWarning):
        return (str(value), value.code) == (str(twin), twin.code)
    if isinstance(value, list | tuple):
        return len(value) == len(twin) and all(map(same_value, value, twin))
    if type(value) is float:
        return bool(value.hex() == twin.hex())
    if is_dataclass(value):
        return all(
            same_value(getattr(value, field.name), getattr(twin, field.name)) for field in fields(value)
        )
    if is_generator(value):
        return same_value(generator_state(value), generator_state(twin))
    if hasattr(value, "dtype"):
        return _same_numbers(value, twin)
    return bool(value == twin)


def _same_numbers(value: Any, twin: Any) -> bool:
    if value.dtype != twin.dtype or value.shape != twin.shape:
        return False
    if type(value).__module__.startswith("torch"):
        import torch

        return bool(torch.equal(as_bits(value), as_bits(twin)))
    return bool(value.tobytes() == twin.tobytes())


def as_bits(tensor: Any) -> Any:
    """Return a tensor's numbers as flat bytes, uint8."""
    import torch

    return (
        tensor.contiguous().reshape(-1).view(torch.uint8)
        if tensor.numel()
        else tensor.reshape(-1).to(torch.uint8)
    )


def is_generator(value: object) -> bool:
    """Return whether `value` is a random generator of Python, NumPy or PyTorch."""
    package = type(value).__module__.partition(".")[0]
    return type(value) is random.Random or (
        type(value).__name__ == "Generator" and package in ("numpy", "torch")
    )


def generator_state(generator: Any) -> Any:
    """Return the state of a random generator as plain values."""
    if type(generator) is random.Random:
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()
