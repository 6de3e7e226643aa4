"""The encoding of states: exact, compact, and safe to read."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.plugin import DamagedState, NestedState
from phaselens.plugin.state_codec import EncodedState, decode_state, encode_state
from phaselens.plugin.states import same_value
from tests.plugin.test_states import PLAIN_VALUES, Range, Totals


def round_trip(value: Any) -> Any:
    return decode_state(encode_state(NestedState(value=value)))["value"]


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_the_same_to_the_bit_after_a_round_trip(value: Any) -> None:
    assert same_value(round_trip(value), value)


def test_numbers_of_every_dtype_are_kept() -> None:
    generator = np.random.default_rng(0)
    dtypes = (
        "bool",
        "int8",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        ">f8",
        "U3",
    )
    arrays = [generator.integers(0, 2, (2, 0, 3) if index == 3 else (2, 3)).astype(dtype)
              for index, dtype in enumerate(dtypes)]  # fmt: skip
    tensors = [
        torch.arange(4).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int16)
    ]
    returned = round_trip([*arrays, *tensors])
    for array, copy in zip(arrays, returned[: len(arrays)], strict=True):
        assert np.array_equal(array, copy)
        assert array.dtype.newbyteorder("=") == copy.dtype
    for tensor, copy in zip(tensors, returned[len(arrays) :], strict=True):
        assert same_value(tensor, copy)


def test_sums_of_an_array_in_another_order_in_memory_stay_the_same() -> None:
    values = np.asfortranarray(np.random.default_rng(0).standard_normal((300, 70)))
    assert round_trip(values).sum(0).tobytes() == values.sum(0).tobytes()
    assert round_trip(values).flags.f_contiguous


@pytest.mark.parametrize("generator", [random.Random(3), np.random.default_rng(3), torch.Generator(),
                                       np.random.Generator(np.random.MT19937(1))])  # fmt: skip
def test_a_random_generator_is_kept(generator: Any) -> None:
    assert same_value(round_trip(generator), generator)


def test_arrays_are_stored_together_by_dtype() -> None:
    encoded = encode_state({f"a{index}": np.full(3, index, dtype=np.float64) for index in range(50)})
    assert {name: array.shape for name, array in encoded.arrays.items()} == {"float64": (150,)}


def test_equal_states_have_equal_digests() -> None:
    digests = {
        encode_state({"words": {"b", "a", "c"}, "numbers": np.arange(4)}).digest,
        encode_state({"words": {"c", "a", "b"}, "numbers": np.arange(4)}).digest,
    }
    assert len(digests) == 1
    assert encode_state({"numbers": np.arange(5)}).digest not in digests


class Careless:
    """A class that is neither a dataclass nor a NamedTuple."""

    def __init__(self) -> None:
        raise AssertionError("run by a file")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            {"dataclass": ["antigravity", "x", []]},
            "antigravity.x, which is not a dataclass of an imported module",
        ),
        ({"dataclass": ["os", "system", []]}, "os.system, which is not a dataclass"),
        ({"dataclass": [__name__, "Careless", []]}, "Careless, which is not a dataclass"),
        ({"named tuple": ["tests.plugin.test_states", "Totals", []]}, "Totals, which is not a named tuple"),
        ({"array": ["float64", 0, [9]]}, "KeyError"),
        ({"generator": ["SystemRandom", {"state": []}]}, "random generator 'SystemRandom', which is unknown"),
        ({"tensor": ["load", "uint8", 0, [1]]}, "a tensor of 'load'"),
        ({"unheard": [0, 0, [0]]}, "an entry of an unknown kind, 'unheard'"),
        ({"a": 1, "b": 2}, "ValueError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_cannot_be_read_is_refused(content: Any, problem: str) -> None:
    text = json.dumps({"state": [["value", content]]})
    with pytest.raises(DamagedState) as caught:
        decode_state(EncodedState(text, {}))
    assert problem in str(caught.value)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("text", ["", "[]", '{"state": 3}', "{" * 10_000, '{"dict": []}'])
def test_text_that_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(DamagedState, match="cannot be read"):
        decode_state(EncodedState(text, {}))


def test_reading_runs_no_code_of_a_class() -> None:
    text = encode_state({"totals": Totals(1), "range": Range(0.0, 1.0)}).text
    assert decode_state(EncodedState(text.replace('["count",1]', '["count","x"]'), {}))["totals"] == Totals(
        "x"
    )  # type: ignore[arg-type]
