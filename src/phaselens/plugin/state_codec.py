"""A state as JSON text and a few flat arrays, exactly, and back. Nothing is imported or run to read one."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.plugin.states import (
    ARRAY_DTYPES,
    BIT_GENERATORS,
    NestedState,
    build_dataclass,
    find_class,
    generator_state,
    is_generator,
    is_named_tuple,
)
from phaselens.plugin.warning import MetricWarning

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class DamagedState(InputError):  # noqa: N818 - named after what it is about
    """A state that cannot be read: it was cut off, changed, or written by another program."""


@dataclass(frozen=True)
class EncodedState:
    """A state as JSON text, and the numbers of all its arrays and tensors, one flat array per dtype.

    An array in the text is its dtype, its offset in the flat array of that dtype, and its shape.
    """

    text: str
    arrays: Mapping[str, np.ndarray]

    @property
    def digest(self) -> str:
        """SHA-256 of the state's content."""
        digest = hashlib.sha256(self.text.encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"\n{name} {len(array)}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def encode_state(tree: Mapping[str, Any]) -> EncodedState:
    """Return a state, as `plain_copy` makes it, in a form that can be written to a file."""
    import numpy as np

    encoder = _StateEncoder()
    text = json.dumps(encoder.encoded(NestedState(tree)), allow_nan=False, separators=(",", ":"))
    return EncodedState(text, {name: np.concatenate(encoder.parts[name]) for name in sorted(encoder.parts)})


def decode_state(encoded: EncodedState) -> NestedState:
    """Return the state that `encode_state` encoded.

    Raises:
        DamagedState: for text that is not a state, and for a class that no imported module has.
    """
    try:
        tree = _StateDecoder(encoded.arrays).decoded(json.loads(encoded.text))
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        if isinstance(error, DamagedState):
            raise
        raise DamagedState(f"the state cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(tree, NestedState):
        raise DamagedState("the state cannot be read: it is not a tree of attributes")
    return tree


class _StateEncoder:
    """Encoder of one state; `parts` collects the numbers of its arrays by dtype."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self._sizes: dict[str, int] = {}

    def encoded(self, value: Any) -> Any:
        """Return the JSON value for a value of the tree. One that JSON lacks is an object with its kind as the key."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return [self.encoded(entry) for entry in value]
        if kind is dict or kind is NestedState:
            pairs = [[self.encoded(key), self.encoded(entry)] for key, entry in value.items()]
            return {"dict" if kind is dict else "state": pairs}
        if kind is tuple:
            return {"tuple": [self.encoded(entry) for entry in value]}
        if kind is MetricWarning:
            return {"warning": [str(value), value.code]}
        if kind in (set, frozenset):
            return {kind.__name__: sorted((self.encoded(entry) for entry in value), key=json.dumps)}
        if is_named_tuple(value):
            return {"named tuple": [*_class_name(kind), [self.encoded(entry) for entry in value]]}
        if is_dataclass(value):
            entries = [[field.name, self.encoded(getattr(value, field.name))] for field in fields(value)]
            return {"dataclass": [*_class_name(kind), entries]}
        if is_generator(value):
            return {"generator": [_generator_name(value), self.encoded(generator_state(value))]}
        if kind.__module__.startswith("torch"):
            return self._tensor(value)
        return self._array(value)

    def _array(self, array: Any) -> Any:
        import numpy as np

        if array.dtype.kind == "U":
            return {"text array": [array.dtype.itemsize // 4, list(array.shape), array.ravel().tolist()]}
        if isinstance(array, np.generic):
            return {"number": self._stored(np.asarray(array).reshape(1))}
        # Sums depend on the order in memory, so that an array in Fortran's order stays in it.
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        numbers = (array.T if is_fortran else array).reshape(-1)
        location = self._stored(numbers.astype(array.dtype.newbyteorder("="), copy=False))
        return {"fortran array" if is_fortran else "array": [*location, list(array.shape)]}

    def _tensor(self, tensor: Tensor) -> Any:
        import torch

        name = str(tensor.dtype).removeprefix("torch.")
        flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
        # A dtype that NumPy lacks, such as bfloat16, is stored as bytes.
        numbers = (flat if name in ARRAY_DTYPES else flat.view(torch.uint8)).numpy()
        return {"tensor": [name, *self._stored(numbers), list(tensor.shape)]}

    def _stored(self, numbers: np.ndarray) -> list[Any]:
        """Add numbers to the flat array of their dtype, and return the dtype and their offset."""
        dtype = numbers.dtype.name
        if dtype.startswith("complex"):  # safetensors lacks complex128
            numbers = numbers.view("uint8")
        stored_as = numbers.dtype.name
        offset = self._sizes.get(stored_as, 0)
        self.parts.setdefault(stored_as, []).append(numbers)
        self._sizes[stored_as] = offset + len(numbers)
        return [dtype, offset]


class _StateDecoder:
    """Decoder of one state, from JSON values and the flat arrays of its numbers."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def decoded(self, value: Any) -> Any:
        """Return the value of the tree for a JSON value.

        Raises:
            DamagedState: for a value of an unknown kind.
        """
        if isinstance(value, list):
            return [self.decoded(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "float":
            return float(content)
        if kind in ("dict", "state"):
            pairs = {self.decoded(key): self.decoded(entry) for key, entry in content}
            return pairs if kind == "dict" else NestedState(pairs)
        if kind == "tuple":
            return tuple(map(self.decoded, content))
        if kind == "warning":
            return MetricWarning(*content)
        if kind in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[kind](map(self.decoded, content))
        if kind in ("named tuple", "dataclass"):
            return self._instance(kind, *content)
        if kind == "generator":
            return _generator(content[0], self.decoded(content[1]))
        if kind == "tensor":
            return self._tensor(*content)
        return self._array(kind, content)

    def _instance(self, kind: str, module: str, qualified_name: str, content: list[Any]) -> Any:
        target = find_class(module, qualified_name)
        is_of_kind = hasattr(target, "_fields") if kind == "named tuple" else is_dataclass(target)
        if target is None or not is_of_kind:
            raise DamagedState(
                f"the state holds a {module}.{qualified_name}, which is not a {kind} of an imported module"
            )
        if kind == "named tuple":
            return tuple.__new__(target, map(self.decoded, content))
        return build_dataclass(target, {name: self.decoded(entry) for name, entry in content})

    def _array(self, kind: str, content: Any) -> Any:
        import numpy as np

        if kind == "text array":
            length, shape, texts = content
            return np.array(texts, dtype=f"<U{max(length, 1)}").reshape(shape)
        if kind == "number":
            dtype, offset = content
            return self._numbers(dtype, offset, 1)[0]
        if kind not in ("array", "fortran array"):
            raise DamagedState(f"the state holds an entry of an unknown kind, {kind!r}")
        dtype, offset, shape = content
        numbers = self._numbers(dtype, offset, math.prod(shape))
        return numbers.reshape(shape) if kind == "array" else numbers.reshape(shape[::-1]).T

    def _tensor(self, name: str, stored_as: str, offset: int, shape: list[int]) -> Tensor:
        import torch

        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise DamagedState(f"the state holds a tensor of {name!r}, which this PyTorch lacks")
        n_numbers = math.prod(shape)
        n_stored = n_numbers if name in ARRAY_DTYPES else n_numbers * dtype.itemsize
        flat = torch.from_numpy(self._numbers(stored_as, offset, n_stored))
        return (flat if flat.dtype == dtype else flat.view(dtype)).reshape(shape)

    def _numbers(self, dtype: str, offset: int, size: int) -> np.ndarray:
        """Return a copy of `size` numbers of a flat array."""
        import numpy as np

        if not size:
            return np.zeros(0, dtype=dtype)
        if dtype.startswith("complex"):
            return self._numbers("uint8", offset, size * np.dtype(dtype).itemsize).view(dtype)
        numbers = self._arrays[dtype][offset : offset + size]
        if len(numbers) != size or offset < 0:
            raise DamagedState(f"the state lacks numbers of {dtype}: it holds {len(numbers)} of {size}")
        return numbers.copy()


def _class_name(kind: type) -> list[str]:
    return [kind.__module__, kind.__qualname__]


def _generator_name(generator: Any) -> str:
    if type(generator) is random.Random:
        return "python"
    return type(generator.bit_generator).__name__ if hasattr(generator, "bit_generator") else "torch"


def _generator(name: str, state: Any) -> Any:
    """Return a random generator in this state."""
    if name == "python":
        generator: Any = random.Random()
        generator.setstate(state)
        return generator
    if name == "torch":
        import torch

        generator = torch.Generator()
        generator.set_state(state)
        return generator
    import numpy as np

    if name not in BIT_GENERATORS:
        raise DamagedState(f"the state holds a random generator {name!r}, which is unknown")
    bit_generator = getattr(np.random, name)()
    bit_generator.state = state
    return np.random.Generator(bit_generator)
