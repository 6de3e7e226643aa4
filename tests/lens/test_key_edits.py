"""Edits of named keys' scores, without the matrix, against the same edits of the matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import InputError
from phaselens.plugin import Batch, Edit
from phaselens.runs import applied
from phaselens.testing.models import FAMILIES
from tests.marks import mark_later_slow
from tests.toys import toy_lens

N = 20  # longer than the tiny models' windows, which are 7
SCORES, MATRIX = "blocks.{layer}.attn.hook_key_scores", "blocks.{layer}.attn.hook_attn_scores"
ORDER = ["llama-gqa", "gpt-oss", "gemma2", "mistral"]


@functools.cache
def lens_of(family: str) -> Any:
    return toy_lens(family, dtype=torch.float64)


def tokens_of(batch: int = 2, length: int = N) -> Tensor:
    return torch.randint(2, 67, (batch, length), generator=torch.Generator().manual_seed(3))


def shifted_matrix(shift: float, keys: Sequence[int], heads: Sequence[int] | None) -> Edit:
    """The edit of the matrix that shifts the scores of the keys, for the queries after each."""

    def change(scores: Tensor, site: Any) -> Tensor:
        scores = scores.clone()
        for key in keys:
            scores[:, :, key + 1 :, key] += shift
        return scores

    return Edit(MATRIX, change, heads=heads)


def shifted_scores(shift: float, keys: Sequence[int], heads: Sequence[int] | None) -> Edit:
    return Edit(SCORES, lambda scores, site: scores + shift, heads=heads, keys=keys)


def output_under(lens: Any, tokens: Tensor, *edits: Edit) -> Tensor:
    with applied(lens, edits):
        return lens.stream(tokens)


@pytest.mark.parametrize("family", mark_later_slow([*ORDER, *(f for f in FAMILIES if f not in ORDER)], 4))
def test_an_edit_of_named_keys_equals_the_edit_of_the_matrix(family: str) -> None:
    lens, tokens = lens_of(family), tokens_of()
    unedited = lens.stream(tokens)
    for shift, keys, heads in (
        (-math.inf, [0], None),
        (-math.inf, [5], [1]),
        (2.0, [0, 9], [0, 3]),
        (-4.0, [9, 0, 30], None),
    ):
        edited = output_under(lens, tokens, shifted_scores(shift, keys, heads))
        expected = output_under(lens, tokens, shifted_matrix(shift, [key for key in keys if key < N], heads))
        assert (edited - expected).abs().max() < 1e-6 * expected.abs().max()
        assert (edited - unedited).abs().max() > 1e-3
        first_changed = min(keys) + 1
        assert torch.equal(edited[:, :first_changed], unedited[:, :first_changed])


def test_a_shift_of_zero_and_a_head_that_is_not_edited_keep_every_bit() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    assert torch.equal(output_under(lens, tokens, shifted_scores(0.0, [0], None)), lens.stream(tokens))
    z: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda value, hook: z.__setitem__(name, value.clone())

    lens.stream(tokens, [("blocks.0.attn.hook_z", keep("unedited"))])
    with applied(lens, [Edit("blocks.0.attn.hook_key_scores", -math.inf, heads=[2])]):
        lens.stream(tokens, [("blocks.0.attn.hook_z", keep("edited"))])
    is_equal = (z["edited"] == z["unedited"]).all(-1)
    assert is_equal[:, :, [0, 1, 3]].all()
    assert not is_equal[:, 1:, 2].any()


def test_edits_of_different_keys_in_one_layer_compose() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    separate = [shifted_scores(-math.inf, [7], None), shifted_scores(1.5, [0, 7], [1])]
    expected = output_under(
        lens, tokens, shifted_matrix(-math.inf, [7], None), shifted_matrix(1.5, [0, 7], [1])
    )
    assert (output_under(lens, tokens, *separate) - expected).abs().max() < 1e-9


def test_keys_by_text_follow_each_text() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    batch = Batch(("a", "b"), (0, 1), (N, N), tokens)
    edit = Edit(SCORES, -math.inf, keys=lambda batch: [3, None])
    with applied(lens, [edit], batch=batch):
        edited = lens.stream(tokens)
    assert torch.equal(edited[1], lens.stream(tokens)[1])
    alone = output_under(lens, tokens[:1], shifted_scores(-math.inf, [3], None))
    assert (edited[:1] - alone).abs().max() < 1e-9


def test_statistics_follow_the_edit() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    statistics: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda value, hook: statistics.__setitem__(name, value.clone())

    points = ("hook_sink", "hook_received", "hook_entropy")
    hooks = [(f"blocks.0.attn.{name}", keep(name)) for name in points]
    with applied(lens, [Edit("blocks.0.attn.hook_key_scores", -math.inf)]):
        edited = lens.stream(tokens, hooks)
    assert float(statistics["hook_sink"][:, :, 1:].max()) == 0.0
    assert statistics["hook_received"][:, :, 0].tolist() == [[1.0] * 4] * 2
    assert (
        edited - output_under(lens, tokens, Edit("blocks.0.attn.hook_key_scores", -math.inf))
    ).abs().max() < 1e-9


def test_the_gradient_reaches_queries_and_keys_through_the_scores() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    gradients = []
    for edit in (shifted_scores(1.0, [0], None), shifted_matrix(1.0, [0], None)):
        embedded = lens.original_model.get_input_embeddings()(tokens).detach().requires_grad_()
        with applied(lens, [edit]), torch.enable_grad(), lens.rows.with_lengths(None):
            output = lens.original_model.base_model(inputs_embeds=embedded, use_cache=False)
            (gradient,) = torch.autograd.grad(output.last_hidden_state.square().sum(), embedded)
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 * gradients[1].abs().max()


def generated(lens: Any, prompt: Tensor, **options: Any) -> Tensor:
    result: Tensor = lens.original_model.generate(
        prompt, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=66, **options
    )
    return result


@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "mistral", "gpt-oss"]))
@pytest.mark.parametrize("point", ["hook_key_scores", "hook_attn_scores"])
def test_decoding_with_a_cache_and_pads_on_the_left_edits_the_same_keys(family: str, point: str) -> None:
    lens, prompt = lens_of(family), torch.tensor([[0, 5, 9, 13, 8]])
    edit = Edit(f"blocks.{{layer}}.attn.{point}", -50.0, keys=[2], positions=range(3, 40))
    with applied(lens, [edit]):
        whole = generated(lens, prompt, use_cache=False)
        assert torch.equal(generated(lens, prompt), whole)
        padded = torch.cat([torch.ones(1, 3, dtype=torch.long), prompt], 1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        assert torch.equal(generated(lens, padded, attention_mask=mask)[:, 3:], whole)
    assert not torch.equal(generated(lens, prompt), whole)


def test_columns_of_a_matrix_can_be_named() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()

    def unnamed(pattern: Tensor, site: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 2, 4:, [0, 3]] = 0.0
        return pattern

    point = "blocks.1.attn.hook_pattern"
    named = Edit(point, 0.0, heads=[2], keys=[0, 3], positions=range(4, N))
    assert torch.equal(output_under(lens, tokens, named), output_under(lens, tokens, Edit(point, unnamed)))


def test_wrong_edits_of_keys_are_refused_by_name() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    with pytest.raises(InputError, match=r"this point has no keys; leave `keys` out"):
        Edit("blocks.0.attn.hook_z", 0.0, keys=[0])
    with pytest.raises(InputError, match="an edit writes inf; give a finite score, or -inf"):
        output_under(lens, tokens, Edit(SCORES, math.inf))
    by_text = Edit(SCORES, -math.inf, keys=lambda batch: [0] * batch.n)
    with pytest.raises(InputError, match="its keys depend on the texts; apply it to texts"):
        output_under(lens, tokens, by_text)
    plain = ("blocks.0.attn.hook_key_scores", lambda scores, hook: scores - 1)
    with (
        applied(lens, [Edit("blocks.0.attn.hook_key_scores", -math.inf, keys=[4])]),
        pytest.raises(InputError, match="one hook of this layer names keys, and another one does not"),
    ):
        lens.stream(tokens, [plain])


def test_a_plain_hook_reads_and_edits_the_requested_key() -> None:
    lens, tokens = lens_of("llama-gqa"), tokens_of()
    scores: list[Tensor] = []
    hooks = [("blocks.0.attn.hook_key_scores", lambda value, hook: scores.append(value.clone()))]
    matrix: list[Tensor] = []
    lens.stream(tokens, hooks, sink_position=4)
    lens.stream(
        tokens, [("blocks.0.attn.hook_attn_scores", lambda value, hook: matrix.append(value.clone()))]
    )
    assert scores[0].shape == (2, 4, N, 1)
    assert (scores[0][:, :, 4:, 0] - matrix[0][:, :, 4:, 4]).abs().max() < 1e-12
    assert bool((scores[0][:, :, :4] == -math.inf).all())
    edited = lens.stream(
        tokens, [("blocks.0.attn.hook_key_scores", lambda value, hook: value - math.inf)], sink_position=4
    )
    expected = output_under(lens, tokens, Edit("blocks.0.attn.hook_key_scores", -math.inf, keys=[4]))
    assert torch.equal(edited, expected)
