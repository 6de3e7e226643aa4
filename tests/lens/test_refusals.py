"""A model that cannot be loaded is refused with its true reason: its own forward, its memory, or a step of the lens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import ModelError, RefusedModel
from phaselens.lens import description, loading, run_checks
from phaselens.lens.refusals import refusing
from phaselens.testing import tiny_model


def _needs_float32(model: Any) -> None:
    """Let the model's MLPs fail in every dtype but float32, as a constant in a family's code does."""

    def multiply(_module: Any, args: tuple[torch.Tensor]) -> None:
        args[0].reshape(-1, args[0].shape[-1]) @ torch.eye(args[0].shape[-1])

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(multiply)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.bfloat16, "try --dtype float32"), (torch.float64, "try --dtype float32")]
)
def test_a_model_that_does_not_run_in_the_dtype_is_refused_for_its_own_error(
    dtype: torch.dtype, advice: str
) -> None:
    model = tiny_model("llama", dtype=dtype)
    _needs_float32(model)
    with pytest.raises(RefusedModel) as refused:
        phaselens.load(model)
    message = str(refused.value)
    assert message.startswith("llama (LlamaForCausalLM): the model's own forward on text fails in ")
    assert str(dtype).removeprefix("torch.") in message
    assert "RuntimeError: expected m1 and m2 to have the same dtype" in message
    assert message.endswith(advice)


def test_the_same_model_is_served_where_it_runs() -> None:
    model = tiny_model("llama")
    _needs_float32(model)
    assert phaselens.load(model).info.dtype == "float32"


@pytest.mark.parametrize(
    ("function", "step"),
    [
        ("has_own_adapter", "measure the parts of its layers, although the model itself runs"),
        ("wrap", "add hook points to its modules"),
        ("detect_rotation", "measure its attention"),
    ],
)
def test_an_error_of_a_step_is_a_refusal_that_names_the_step(
    function: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = IndexError("index 3 is out of\nrange")

    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    module = description if function == "detect_rotation" else loading
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(RefusedModel) as refused:
        phaselens.load(tiny_model("llama"))
    assert str(refused.value) == (
        f"llama (LlamaForCausalLM): PhaseLens could not {step} (IndexError: index 3 is out of range); use a model type "
        "that docs/families.md lists as served, and please report this one with the output of --debug"
    )
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "it attends in both directions",
            "llama (LlamaForCausalLM): it attends in both directions; use a model type that docs/families.md lists as "
            "served",
        ),
        ("llama: another reason; use positions='auto'", "llama: another reason; use positions='auto'"),
    ],
)
def test_a_refusal_inside_a_step_names_the_family_and_what_to_do(reason: str, message: str) -> None:
    with pytest.raises(RefusedModel) as refused, refusing(tiny_model("llama"), "check it"):
        raise RefusedModel(reason)
    assert str(refused.value) == message


def test_a_check_that_cannot_run_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = phaselens.load(tiny_model("llama"), check="report")

    def fail(*_args: Any, **_options: Any) -> Any:
        raise ValueError("shared layers need those below")

    monkeypatch.setattr(lens, "stream", fail)
    with pytest.raises(RefusedModel, match=r"PhaseLens could not check it .ValueError: shared layers need"):
        run_checks(lens)


def test_memory_that_ran_out_is_not_a_refusal() -> None:
    with (
        pytest.raises(ModelError, match=r"llama .*: not enough memory .*; use a smaller dtype") as error,
        refusing(tiny_model("llama"), "check it"),
    ):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")
    assert not isinstance(error.value, RefusedModel)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "use a model type that docs/families.md lists as served, and please report this one"),
        (torch.bfloat16, "try --dtype float32; if it fails there too, please report it"),
    ],
)
def test_a_failed_check_advises_another_dtype_only_where_there_is_a_better_one(
    dtype: torch.dtype, advice: str
) -> None:
    from phaselens.lens.check_results import CheckResult
    from phaselens.lens.checks import require

    lens = phaselens.load(tiny_model("llama", dtype=dtype), check=False)
    with pytest.raises(RefusedModel, match="failed its check 'logits'") as refused:
        require(lens, [CheckResult("logits", False, 0.5, 2e-5, "worst in layer 1")])
    assert str(refused.value).endswith(advice)
