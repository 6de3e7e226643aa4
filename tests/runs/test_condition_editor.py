"""Edits outside of a run: absolute positions in prefill and decode, with and without a KV cache, padded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import InputError
from phaselens.plugin import Condition, Edit
from phaselens.runs import applied
from tests.marks import mark_later_slow
from tests.toys import toy_lens

MLP = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module", params=mark_later_slow(["llama", "llama-drope-nope", "gpt2", "mistral"], 2))
def lens(request: pytest.FixtureRequest) -> Any:
    return toy_lens(request.param, dtype=torch.float64)


def recording_edit(calls: list[list[list[int]]]) -> Edit:
    """An edit of BOS that records the positions of each call."""

    def change(tensor: Tensor, site: Any) -> Tensor:
        calls.append(site.positions.tolist())
        return tensor * 0.0

    return Edit(MLP, change, positions=[0])


def generate(lens: Any, prompt: Tensor, n: int, **options: Any) -> Tensor:
    result: Tensor = lens.original_model.generate(
        prompt, max_new_tokens=n, do_sample=False, pad_token_id=1, eos_token_id=66, **options
    )
    return result


@pytest.mark.parametrize("cached", [True, False])
def test_bos_is_edited_in_the_prefill_and_decoded_tokens_are_not(lens: Any, cached: bool) -> None:
    prompt = torch.tensor([[0, 5, 9, 13]])
    calls: list[list[list[int]]] = []
    with applied(lens, [recording_edit(calls)]) as effects:
        edited = generate(lens, prompt, 5, use_cache=cached)
    # Without a cache, position 0 is in every step; with a cache, only in the prefill.
    assert len(calls) == (1 if cached else edited.shape[1] - prompt.shape[1])
    assert all(positions[0][0] == 0 for positions in calls)
    assert effects[MLP].changed


@pytest.mark.parametrize(
    "condition",
    [
        Condition("mlp", [Edit(MLP, 0.0, [0])]),
        Condition("v", [Edit("blocks.{layer}.attn.hook_v", 0.0, [0])]),
        Condition("dimension", [Edit("blocks.{layer}.attn.hook_rot_k", lambda x, site: x * 0.5)]),
        Condition("query", [Edit("blocks.0.attn.hook_rot_q", 2.0, heads=[1])]),
        Condition("later", [Edit("blocks.0.hook_attn_out", 0.0, [5])]),
    ],
    ids=lambda condition: condition.name,
)
def test_a_cache_changes_no_logit_under_a_condition(lens: Any, condition: Condition) -> None:
    tokens = torch.tensor([[0, 5, 9, 13, 21, 8, 30]])
    with torch.no_grad(), applied(lens, condition) as effects:
        full_logits = lens.original_model(tokens).logits
        first = lens.original_model(tokens[:, :3], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for position in range(3, 7):
            step = lens.original_model(
                tokens[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            steps.append(step.logits)
            cache = step.past_key_values
    assert torch.allclose(torch.cat(steps, 1), full_logits, atol=1e-10)
    assert all(effect.changed for effect in effects.values())
    with torch.no_grad():
        assert not torch.allclose(lens.original_model(tokens).logits, full_logits, atol=1e-6)


def test_the_first_row_of_a_chunk_is_not_bos(lens: Any) -> None:
    """An edit of row 0 of each forward, rather than of position 0, would change every decoded token."""
    tokens = torch.tensor([[0, 5, 9, 13]])

    def first_row(tensor: Tensor, hook: Any) -> Tensor:
        return torch.cat([tensor[:, :1] * 0.0, tensor[:, 1:]], 1)

    with torch.no_grad(), lens.hooks(fwd_hooks=[(MLP, first_row)]):
        full_logits = lens.original_model(tokens).logits[:, -1]
        cache = lens.original_model(tokens[:, :3], use_cache=True).past_key_values
        step = lens.original_model(tokens[:, 3:], past_key_values=cache).logits[:, -1]
    assert not torch.allclose(step, full_logits, atol=1e-6)


def test_a_prompt_padded_on_the_left_has_its_first_token_at_position_0(lens: Any) -> None:
    prompt, padded = torch.tensor([[0, 5, 9]]), torch.tensor([[1, 1, 0, 5, 9], [0, 7, 8, 5, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    calls: list[list[list[int]]] = []
    with torch.no_grad(), applied(lens, [recording_edit(calls)]):
        separate = generate(lens, prompt, 4)
        combined = generate(lens, padded, 4, attention_mask=mask)
    assert calls[1] == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert combined[0, 5:].tolist() == separate[0, 3:].tolist()


def test_no_hook_remains_after_an_error(lens: Any) -> None:
    tokens = torch.tensor([[0, 5, 9]])
    before = lens.stream(tokens)
    with pytest.raises(ZeroDivisionError), applied(lens, [Edit(MLP, 0.0)]):
        raise ZeroDivisionError
    assert torch.equal(lens.stream(tokens), before)
    assert not lens.require_hook(MLP).fwd_hooks
    with (
        pytest.raises(InputError, match="no hook point"),
        applied(lens, [Edit("blocks.9.hook_mlp_out", 0.0)]),
    ):
        pass


def test_an_edit_can_read_weights_and_choose_rows(lens: Any) -> None:
    def write(tensor: Tensor, site: Any) -> Tensor:
        weight = site.weight("attn.W_O")
        return torch.where(site.mask([1])[..., None], tensor + weight.abs().mean(), tensor)

    tokens = torch.tensor([[0, 5, 9]])
    before = lens.stream(tokens, stop_at_layer=1)
    with applied(lens, [Edit("blocks.0.hook_resid_post", write)]):
        after = lens.stream(tokens, stop_at_layer=1)
    assert (after != before).any(-1).tolist() == [[False, True, False]]


@pytest.mark.slow
def test_positions_are_found_in_tensors_with_the_head_axis_first() -> None:
    """Gemma 3 normalises queries as [batch, head, pos, d_head]; with as many tokens as heads the axes look alike."""
    import phaselens
    from phaselens.testing import tiny_model

    lens = phaselens.load(tiny_model("gemma3"), check=False)
    point = "blocks.1.attn.q_norm.hook_out"
    assert lens.position_axis(point) == 2
    assert lens.position_axis("blocks.1.attn.hook_q") == 1
    tokens = torch.tensor([[0, 5, 7, 9]])
    collected: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda value, hook: collected.__setitem__(name, value.detach().clone())

    lens.stream(tokens, [(point, keep("before"))])
    with applied(lens, [Edit(point, 0.0, positions=[2])]):
        lens.stream(tokens, [(point, keep("after"))])
    assert collected["before"].shape == (1, 4, 4, 8)
    expected = collected["before"].clone()
    expected[:, :, 2] = 0
    assert torch.equal(collected["after"], expected)


@pytest.mark.parametrize("to", [0.0, lambda tensor, site: tensor * 0.5])
@pytest.mark.parametrize("point", ["hook_mlp_out", "attn.hook_pattern"])
def test_a_condition_is_the_same_under_inference_mode(lens: Any, point: str, to: Any) -> None:
    condition = Condition("edited", [Edit(f"blocks.0.{point}", to, positions=[2])])
    tokens = torch.tensor([[0, 5, 7, 9]])
    with applied(lens, condition):
        expected = lens.stream(tokens)
    with torch.inference_mode(), applied(lens, condition) as effects:
        assert torch.equal(lens.stream(tokens), expected)
    assert effects[f"blocks.0.{point}"].changed


def test_named_entries_of_the_last_dimension_alone_are_edited() -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    tokens = torch.tensor([[0, 5, 9, 13], [0, 6, 7, 8]])
    kept: dict[str, Tensor] = {}
    hooks = [("blocks.0.hook_resid_post", lambda value, hook: kept.update(value=value.clone()))]
    lens.stream(tokens, hooks)
    clean = kept["value"]
    with applied(lens, [Edit("blocks.0.hook_mlp_out", 7.0, positions=[1], entries=[3, 5])]):
        lens.stream(tokens, hooks)
    changed = (kept["value"] != clean).nonzero().tolist()
    assert changed == [[text, 1, entry] for text in (0, 1) for entry in (3, 5)]
    with (
        pytest.raises(InputError, match="entry 32 of 32"),
        applied(lens, [Edit("blocks.0.hook_mlp_out", 0.0, entries=[32])]),
    ):
        lens.stream(tokens)
    with pytest.raises(InputError, match="name them by `keys`"):
        Edit("blocks.0.attn.hook_pattern", 0.0, entries=[0])


def test_the_rotation_that_all_texts_share_is_edited_once() -> None:
    from phaselens.plugin import Batch

    lens = toy_lens("llama", dtype=torch.float64)
    tokens = torch.tensor([[0, 5, 9, 13], [0, 6, 0, 0]])
    batch = Batch(("a", "b"), (0, 1), (4, 2), tokens)
    shapes: list[tuple[int, ...]] = []
    edits = [
        Edit("blocks.{layer}.attn.hook_cos", 1.0, entries=[0, 4]),
        Edit("blocks.{layer}.attn.hook_sin", 0.0, entries=[0, 4]),
    ]
    hooks = [("blocks.1.attn.hook_sin", lambda value, hook: shapes.append(tuple(value.shape)))]
    with applied(lens, edits, batch=batch) as effects:
        edited = lens.stream(tokens, hooks, lengths=torch.tensor([4, 2]))
        alone = lens.stream(tokens[1:, :2])
    assert shapes == [(1, 4, 8)]
    assert effects["blocks.0.attn.hook_sin"].changed
    torch.testing.assert_close(edited[1:, :2], alone)
