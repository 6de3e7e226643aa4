"""Errors for arguments that do not fit: they say which argument, what is expected, and what was received."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from phaselens import attention
from phaselens.errors import InputError
from tests.attention.reference import random_qkv
from tests.public_calls import CALLS

FUNCTIONS = [name for name in attention.__all__ if getattr(attention, name) in CALLS]
AXES = {
    "norm_matrix": {"states": "[pos, head, d_head]"},
    "massive_cells": {"norms": "[head, d_head]"},
    "explicit_pattern": {"scores": "[batch, head, query, key]"},
    "key_geometry": {"q": "[pos, head, d_head]", "k": "[pos, kv_head, d_head]"},
    "largest_product": {"q": "[pos, head, d_head]", "k": "[pos, kv_head, d_head]"},
    "reweighted": {"own": "[batch, head, position, d_v]", "v": "[batch, head, position, d_v]"},
    "rows_changed": {"scores": "[batch, head, query, n]", "edited": "[batch, head, query, n]"},
    "triangular": {"w_o": "[head, d_head, d_model]"},
    "head_norms": {"z": "[pos, head, d_head]", "factor": "[head, row, d_head]"},
    "writes": {"mass": "[head, query]", "value": "[head, d_head]", "w_o": "[head, d_head, d_model]"},
    "scaled_writes": {
        "mass": "[head, query]",
        "values": "[query, head, d_head]",
        "w_o": "[head, d_head, d_model]",
        "factor": "[head, row, d_head]",
    },
}


def message_of(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        function(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_of_another_type_is_named(name: str) -> None:
    function = getattr(attention, name)
    arguments = CALLS[function]()
    for argument, value in arguments.items():
        message = message_of(function, {**arguments, argument: "x"})
        is_of_problem = argument in ("q", "k") and value.ndim == 4
        assert message.startswith(f"expected {'q and k' if is_of_problem else argument} "), argument
        assert re.search(r", received (str|'x'|Tensor and str|str and Tensor)$", message), message


@pytest.mark.parametrize(
    ("name", "argument", "axes"),
    [(name, argument, axes) for name, by_argument in AXES.items() for argument, axes in by_argument.items()],
)
def test_a_tensor_with_another_number_of_axes_is_named_with_its_axes(
    name: str, argument: str, axes: str
) -> None:
    function = getattr(attention, name)
    arguments = CALLS[function]()
    tensor = arguments[argument][None]
    assert message_of(function, {**arguments, argument: tensor}) == (
        f"expected {argument} as a tensor {axes}, received one of shape {tuple(tensor.shape)}"
    )


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "lse" in CALLS[getattr(attention, name)]()])
def test_functions_without_a_gradient_name_themselves_and_the_one_that_has_it(name: str) -> None:
    function = getattr(attention, name)
    arguments = CALLS[function]()
    for argument in ("q", "k", "lse", "sink_logits"):
        tensor = arguments[argument].clone().requires_grad_()
        with pytest.raises(
            RuntimeError, match=r"^\w+ streams .* phaselens.attention.explicit.*differentiable$"
        ):
            function(**{**arguments, argument: tensor})


@pytest.mark.parametrize("name", ["attend", "attend_without"])
def test_attention_without_a_gradient_names_itself(name: str) -> None:
    function = getattr(attention, name)
    arguments = CALLS[function]()
    for argument in ("q", "k", "v", "sink_logits", "bias"):
        tensor = arguments[argument].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"^{name} streams through kernels .*no gradient"):
            function(**{**arguments, argument: tensor})


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((0, 2, 4), (0, 2, 4)),
        ((5, 2, 4), (4, 2, 4)),
        ((5, 2, 4), (5, 2, 3)),
        ((5, 3, 4), (5, 2, 4)),
        ((5, 2, 4), (5, 4, 4)),
        ((5, 2, 4), (5, 0, 4)),
        ((5, 0, 4), (5, 2, 4)),
    ],
)
def test_states_of_one_text_that_do_not_fit_are_refused_with_their_shapes(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...]
) -> None:
    for name, options in (("key_geometry", {"scale": 1.0}), ("largest_product", {})):
        arguments = {"q": torch.ones(q_shape), "k": torch.ones(k_shape), **options}
        message = message_of(getattr(attention, name), arguments)
        assert message.startswith("expected k [pos, kv_head, d_head] ")
        assert message.endswith(f"received q {q_shape} and k {k_shape}")


@pytest.mark.parametrize("keys", [torch.zeros(2), torch.zeros(2, 1, 1), torch.zeros(3, 1), torch.zeros(0, 1)])
def test_indices_of_keys_are_given_for_each_text_or_for_all(keys: torch.Tensor) -> None:
    q, k, v = random_qkv(4, batch=2)
    message = r"^expected keys \[batch \| 1, n\] for 2 texts, received " + re.escape(str(tuple(keys.shape)))
    for call in (attention.key_scores, attention.attend_without):
        values = {"v": v} if call is attention.attend_without else {}
        with pytest.raises(InputError, match=message):
            call(q=q, k=k, keys=keys.long(), scale=1.0, **values)
    with pytest.raises(InputError, match=message.replace("expected keys", "expected hidden_keys")):
        attention.attend(q, k, v, scale=1.0, hidden_keys=keys.long())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float16])
def test_indices_of_keys_are_whole_numbers(dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(4, batch=1)
    with pytest.raises(InputError, match=rf"^expected keys .* whole numbers, received {dtype}$"):
        attention.key_scores(q, k, torch.zeros(1, 1, dtype=dtype), scale=1.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_keys_have_any_dtype_of_whole_numbers(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(4, batch=1)
    keys = torch.tensor([[1]])
    scores = attention.key_scores(q, k, keys, scale=1.0)
    rest = attention.attend_without(q, k, v, keys, scale=1.0)
    narrow_keys = keys.to(dtype)
    assert torch.equal(attention.key_scores(q, k, narrow_keys, scale=1.0), scores)
    assert torch.equal(attention.attend_without(q, k, v, narrow_keys, scale=1.0).out, rest.out)
    assert torch.equal(rest.output(v, narrow_keys, scores), rest.output(v, keys, scores))


def test_a_window_holds_at_least_the_querys_own_key() -> None:
    q, k, v = random_qkv(4, batch=1)
    for window in (0, -3):
        for call in (
            lambda window=window: attention.attend(q, k, v, scale=1.0, window=window),
            lambda window=window: attention.sink_score(q[..., 0], torch.tensor([4]), window=window),
            lambda window=window: attention.uniform_sink(4, window=window),
            lambda window=window: attention.key_geometry(q[0], q[0], scale=1.0, window=window),
            lambda window=window: attention.largest_product(q[0], q[0], window=window),
        ):
            with pytest.raises(
                InputError, match=f"^expected a window of at least 1 key .* received {window}$"
            ):
                call()
    for wrong in (True, 1.0):
        with pytest.raises(
            InputError, match=f"^expected window as a whole number of at least 1, received {wrong}$"
        ):
            attention.attend(q, k, v, scale=1.0, window=wrong)
    out, _ = attention.attend(q, k, v, scale=1.0, window=1)
    assert torch.equal(out, v)


def test_finite_numbers_are_told_from_others_anywhere() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for index in ((0, 0), (1, 2)):
            states = torch.arange(6.0).view(2, 3) - 3
            assert attention.all_finite(states)
            states[index] = bad
            assert not attention.all_finite(states)
    assert attention.all_finite(torch.zeros(0, 3))
    assert attention.all_finite(torch.tensor([65504.0], dtype=torch.float16))
