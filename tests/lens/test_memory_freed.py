"""A lens, and what its calls return, leave memory with the last reference to them: no cycle holds them until then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.lens import HookedTransformer
from phaselens.testing import tiny_model
from tests.toys import save_checkpoint

TOKENS = torch.tensor([[1, 2, 3, 1]])
RESIDUAL = "blocks.0.hook_resid_post"


def in_hooks(lens: HookedTransformer) -> None:
    with lens.hooks(fwd_hooks=[(RESIDUAL, lambda value, hook: value * 2)]):
        lens(TOKENS)


def in_a_hook_that_raises(lens: HookedTransformer) -> None:
    def fail(value: torch.Tensor, hook: object) -> None:
        raise KeyError(RESIDUAL)

    with pytest.raises(KeyError):
        lens.stream(TOKENS, [(RESIDUAL, fail)])


def resumed(lens: HookedTransformer) -> None:
    lens.stream(residual=lens.stream(TOKENS, stop_at_layer=1), start_at_layer=1)


USES: dict[str, Callable[[HookedTransformer], object]] = {
    "loaded": lambda lens: None,
    "streamed": lambda lens: lens.stream(TOKENS, [("hook_loss", lambda value, hook: None)], unembed=True),
    "cached": lambda lens: lens.run_with_cache(TOKENS),
    "hooked": in_hooks,
    "failed": in_a_hook_that_raises,
    "generated": lambda lens: lens.generate(TOKENS, max_new_tokens=2, verbose=False),
    "resumed": resumed,
}


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


QUICK = ("streamed", "failed")


@pytest.mark.parametrize(
    ("family", "use"),
    [
        pytest.param(family, use, marks=[] if family == "llama" and use in QUICK else pytest.mark.slow)
        for family in ("llama", "gpt2", "gpt-oss", "smollm3")
        for use in USES
    ],
)
def test_weights_leave_memory_with_the_lens(family: str, use: str) -> None:
    lens = phaselens.load(tiny_model(family))
    USES[use](lens)
    weights = [weakref.ref(weight) for weight in lens.original_model.parameters()]
    assert weights
    del lens
    assert [weight for weight in weights if weight() is not None] == []


def test_what_a_call_returns_leaves_memory_with_it() -> None:
    lens = phaselens.load(tiny_model("llama"))
    returned = [weakref.ref(lens.stream(TOKENS)), weakref.ref(lens.run_with_hooks(TOKENS))]
    with lens.hooks(fwd_hooks=[(RESIDUAL, lambda value, hook: value)]):
        returned.append(weakref.ref(lens(TOKENS)))
    assert [tensor for tensor in returned if tensor() is not None] == []


@pytest.mark.parametrize("family", ["granite", pytest.param("phi3", marks=pytest.mark.slow)])
def test_the_next_lens_makes_room_where_an_adapter_of_transformer_lens_makes_cycles(family: str) -> None:
    lens = phaselens.load(tiny_model(family))
    weights = [weakref.ref(weight) for weight in lens.original_model.parameters()]
    del lens
    phaselens.load(tiny_model("llama"))
    assert [weight for weight in weights if weight() is not None] == []


def test_a_lens_in_use_is_followed_without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    lens = phaselens.load(tiny_model("llama"))
    del lens
    second = phaselens.load(tiny_model("llama"))
    phaselens.load(tiny_model("llama"))
    assert second.dtype == torch.float32
    assert not collected


@pytest.mark.slow
def test_a_run_keeps_no_lens(tmp_path: Path) -> None:
    lens = phaselens.load(save_checkpoint(tmp_path / "tiny"))
    phaselens.run(lens, metrics=["sinks", "bos-norm", "bos-v"], texts=["a b c d", "b c a"])
    reference = weakref.ref(lens)
    del lens
    assert reference() is None
