"""Edits of tensors made by hand: which rows, heads, entries and columns change, and how wrong edits are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import InputError
from phaselens.plugin import Batch, Edit, EditEffect
from phaselens.runs import applied
from phaselens.runs.condition_editor import ConditionEditor, edited_keys
from tests.toys import toy_lens

MLP, Q, PATTERN = "blocks.1.hook_mlp_out", "blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern"
N_HEADS = 4


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(dtype=torch.float64)


def batch_of(*lengths: int) -> Batch:
    names = tuple("abcdef"[: len(lengths)])
    return Batch(
        names,
        tuple(range(len(lengths))),
        lengths,
        torch.arange(len(lengths) * max(lengths)).reshape(-1, max(lengths)),
    )


def counted(*shape: int) -> Tensor:
    """A tensor of 1, 2, …, none of which is an edit's value."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def changed_cells(before: Tensor, after: Tensor | None) -> set[tuple[int, ...]]:
    assert after is not None
    return {tuple(cell) for cell in (before != after).nonzero().tolist()}


def test_rows_are_edited_by_absolute_position_and_pads_never(lens: Any) -> None:
    batch = batch_of(3, 2)
    tensor = counted(2, 3, 32)
    editor = ConditionEditor(lens, [Edit(MLP, 0.0)], batch)
    after = editor.apply(0, tensor, torch.arange(3)[None])
    assert {cell[:2] for cell in changed_cells(tensor, after)} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    two_rows = ConditionEditor(lens, [Edit(MLP, 0.0, positions=[5, 1])], batch)
    after = two_rows.apply(0, tensor, torch.arange(3)[None])
    assert {cell[:2] for cell in changed_cells(tensor, after)} == {(0, 1), (1, 1)}
    assert two_rows.apply(0, tensor, torch.tensor([[7, 8, 9]])) is None
    # Without texts, pads have negative positions.
    padded = ConditionEditor(lens, [Edit(MLP, 0.0)]).apply(0, tensor, torch.tensor([[-1, 0, 1]]))
    assert {cell[1] for cell in changed_cells(tensor, padded)} == {1, 2}


def test_heads_entries_and_columns_are_named(lens: Any) -> None:
    queries = counted(2, 3, N_HEADS, 8)
    edit = Edit(Q, 0.0, positions=[2], heads=[0, 3], entries=[0, 7])
    after = ConditionEditor(lens, [edit]).apply(0, queries, torch.arange(3)[None])
    assert changed_cells(queries, after) == {
        (text, 2, head, entry) for text in (0, 1) for head in (0, 3) for entry in (0, 7)
    }
    # The chunk's rows are the queries at 3 and 4; its columns all keys from 0 on.
    pattern = counted(1, N_HEADS, 2, 5)
    edit = Edit(PATTERN, 0.0, positions=[4], heads=[1], keys=[0, 3, 9])
    after = ConditionEditor(lens, [edit]).apply(0, pattern, torch.tensor([[3, 4]]))
    assert changed_cells(pattern, after) == {(0, 1, 1, 0), (0, 1, 1, 3)}
    after = ConditionEditor(lens, [edit]).apply(
        0, pattern, torch.tensor([[3, 4]]), torch.tensor([[-1, -1, 0, 1, 2]])
    )
    assert changed_cells(pattern, after) == {(0, 1, 1, 2)}


def test_columns_can_differ_by_text_and_a_text_can_have_none(lens: Any) -> None:
    batch = batch_of(3, 3, 3)
    pattern = counted(3, N_HEADS, 3, 3)
    edit = Edit(PATTERN, 0.0, keys=lambda batch: (0, None, 2))
    editor = ConditionEditor(lens, [edit], batch)
    after = editor.apply(0, pattern, torch.arange(3)[None])
    assert {(cell[0], cell[3]) for cell in changed_cells(pattern, after)} == {(0, 0), (2, 2)}
    # Columns of pads, which have no position, are not those of a text without a key.
    after = editor.apply(0, pattern, torch.arange(3)[None], torch.tensor([[-1, 0, 1]]))
    assert {(cell[0], cell[3]) for cell in changed_cells(pattern, after)} == {(0, 1)}


def test_keys_that_a_query_does_not_see_stay_unseen(lens: Any) -> None:
    scores = counted(1, N_HEADS, 2, 2)
    scores[:, :, 0, 1] = -torch.inf
    edit = Edit("blocks.1.attn.hook_attn_scores", 0.0, keys=[1])
    after = ConditionEditor(lens, [edit]).apply(0, scores, torch.arange(2)[None])
    assert {cell[2:] for cell in changed_cells(scores, after)} == {(1, 1)}
    hidden = torch.full_like(scores, -torch.inf)
    editor = ConditionEditor(lens, [edit])
    assert editor.apply(0, hidden, torch.arange(2)[None]) is None
    assert editor.effects == {edit.point: EditEffect(written=False, changed=False, constant=True)}


def test_effects_say_whether_an_edit_wrote_and_whether_it_changed(lens: Any) -> None:
    edits = [
        Edit(MLP, 0.0, positions=[0]),
        Edit(MLP, lambda tensor, site: tensor.clone(), positions=[0]),
        Edit(MLP, 2.0, positions=[9]),
    ]
    editor = ConditionEditor(lens, edits)
    names = [MLP, f"{MLP} (2)", f"{MLP} (3)"]
    assert list(editor.effects) == names
    zeros = torch.zeros(1, 2, 32, dtype=torch.float64)
    for number in range(3):
        editor.apply(number, zeros, torch.arange(2)[None])
    effects = [editor.effects[name] for name in names]
    assert [(effect.written, effect.changed, effect.constant) for effect in effects] == [
        (True, False, True), (True, False, False), (False, False, True),
    ]  # fmt: skip
    editor.apply(0, zeros + 1, torch.arange(2)[None])
    editor.apply(0, zeros, torch.arange(2)[None])
    assert editor.effects[MLP].changed  # a later batch without a change does not undo that


def test_a_function_gets_copies_and_its_site(lens: Any) -> None:
    sites: list[Any] = []

    def change(tensor: Tensor, site: Any) -> Tensor:
        sites.append(site)
        site.positions.zero_()
        site.batch.tokens.zero_()
        site.weight("attn.W_O").zero_()
        return torch.full(tensor.shape, 2.5, dtype=torch.float64)

    batch, positions = batch_of(5, 5), torch.tensor([[3, 4]])
    tokens, weight = batch.tokens.clone(), lens.weight_of(1, "attn.W_O").clone()
    tensor = counted(2, 2, 32).float()
    editor = ConditionEditor(lens, [Edit("blocks.{layer}.hook_mlp_out", change)], batch)
    assert [edit.point for edit in editor.edits] == ["blocks.0.hook_mlp_out", MLP]
    edited = editor.apply(1, tensor, positions)
    assert edited is not None
    assert edited.dtype == torch.float32
    assert bool((edited == 2.5).all())
    (site,) = sites
    assert (site.point, site.layer, site.batch.lengths) == (MLP, 1, (5, 5))
    assert positions.tolist() == [[3, 4]]
    assert torch.equal(tokens, batch.tokens)
    assert torch.equal(lens.weight_of(1, "attn.W_O"), weight)


def test_the_rotation_of_all_texts_is_edited_where_any_text_is(lens: Any) -> None:
    cos = counted(1, 4, 8)
    edit = Edit("blocks.0.attn.hook_cos", 0.0)
    after = ConditionEditor(lens, [edit], batch_of(4, 2)).apply(0, cos, torch.arange(4)[None])
    assert {cell[:2] for cell in changed_cells(cos, after)} == {(0, 0), (0, 1), (0, 2), (0, 3)}
    one_text = ConditionEditor(lens, [edit], batch_of(2)).apply(0, cos, torch.arange(4)[None])
    assert {cell[:2] for cell in changed_cells(cos, one_text)} == {(0, 0), (0, 1)}


@pytest.mark.parametrize(
    ("edit", "shape", "message"),
    [
        (Edit(Q, 0.0, heads=[4]), (1, 3, 4, 8), rf"edit of {Q}: head 4 of 4"),
        (Edit(MLP, 0.0, entries=[32]), (1, 3, 32), rf"edit of {MLP}: entry 32 of 32"),
        (Edit(MLP, 0.0), (1, 2, 32), rf"edit of {MLP}: its tensor \[1, 2, 32\] has no dimension of 3 positions"),
        (Edit(MLP, 0.0), (1, 3), r"its tensor \[1, 3\] has no dimension of 3 positions"),
        (Edit(MLP, 0.0), (1, 3, 2, 2, 2), r"its tensor \[1, 3, 2, 2, 2\] has no dimension of 3 positions"),
        (Edit(MLP, lambda tensor, site: 3), (1, 3, 32), rf"the edit of {MLP} returned int; return .*\[1, 3, 32\]"),
        (Edit(MLP, lambda tensor, site: tensor[:, :2]), (1, 3, 32), r"returned \[1, 2, 32\]; return .*\[1, 3, 32\]"),
        (Edit(MLP, lambda tensor, site: tensor.mul_(2)), (1, 3, 32), rf"the edit of {MLP} changed its tensor in place"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(lens: Any, edit: Edit, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConditionEditor(lens, [edit]).apply(0, counted(*shape), torch.arange(3)[None])


def test_the_last_head_and_the_last_entry_fit(lens: Any) -> None:
    queries = counted(1, 1, N_HEADS, 8)
    edit = Edit(Q, 0.0, heads=[N_HEADS - 1], entries=[7])
    after = ConditionEditor(lens, [edit]).apply(0, queries, torch.tensor([[0]]))
    assert changed_cells(queries, after) == {(0, 0, N_HEADS - 1, 7)}


def test_points_that_cannot_be_edited_are_refused_by_name(lens: Any) -> None:
    for edit, message in (
        (Edit(MLP, 0.0, heads=[0]), rf"edit of {MLP}: this point has no heads; leave `heads` out"),
        (Edit("unembed.hook_out", 0.0), r"edit of unembed\.hook_out: .*edit ln_final\.hook_out instead"),
        (Edit("blocks.7.hook_mlp_out", 0.0), r"no hook point 'blocks\.7\.hook_mlp_out'"),
    ):
        with pytest.raises(InputError, match=message):
            ConditionEditor(lens, [edit])


@pytest.mark.parametrize(
    ("keys", "received"),
    [
        ([0], r"\[0\]"),
        ([0, 1, 2], r"\[0, 1, 2\]"),
        ("ab", "'ab'"),
        (b"ab", "b'ab'"),
        (5, "5"),
        ({0: 1, 1: 1}, "0: 1"),
    ],
)
def test_keys_that_are_no_list_by_text_are_refused(keys: Any, received: str) -> None:
    edit = Edit(PATTERN, 0.0, keys=lambda batch: keys)
    with pytest.raises(InputError, match=rf"edit of {PATTERN}: keys returned .*{received}.*batch's 2 texts"):
        edited_keys(edit, batch_of(2, 2))


@pytest.mark.parametrize("key", [-1, 1.0, True, "0"])
def test_keys_that_are_no_positions_are_refused(key: Any) -> None:
    edit = Edit(PATTERN, 0.0, keys=lambda batch: [0, key])
    with pytest.raises(
        InputError, match=rf"edit of {PATTERN}: keys returned {key!r}; give whole numbers from 0"
    ):
        edited_keys(edit, batch_of(2, 2))


def test_keys_are_positions_by_text_or_one_list_for_all() -> None:
    batch = batch_of(2, 1, 2)
    by_text = Edit(PATTERN, 0.0, keys=lambda texts: [None if n == 1 else n - 2 for n in texts.lengths])
    assert edited_keys(by_text, batch, default=[7]).tolist() == [[0], [-1], [0]]
    assert edited_keys(Edit(PATTERN, 0.0, keys=[4, 2]), batch, default=[7]).tolist() == [[4, 2]]
    assert edited_keys(Edit(PATTERN, 0.0), batch, default=[7]).tolist() == [[7]]
    no_key = edited_keys(Edit(PATTERN, 0.0, keys=lambda texts: [None] * texts.n), batch, default=[7])
    assert no_key.dtype == torch.long

    def spoil(texts: Batch) -> list[int]:
        texts.tokens.zero_()
        return [0] * texts.n

    edited_keys(Edit(PATTERN, 0.0, keys=spoil), batch)
    assert batch.tokens.any()
    with pytest.raises(InputError, match=rf"edit of {PATTERN}: its keys depend on the texts"):
        edited_keys(by_text, None)


def test_an_edit_of_every_layer_takes_the_layers_that_have_the_point() -> None:
    import phaselens
    from tests.lens.measured import model_of

    hybrid = phaselens.load(model_of("bamba"), label="bamba", check=False)
    editor = ConditionEditor(hybrid, [Edit("blocks.{layer}.attn.hook_z", 0.0)])
    assert [edit.layer for edit in editor.edits] == [1]
    with pytest.raises(InputError, match="layer 0"):
        ConditionEditor(hybrid, [Edit("blocks.0.attn.hook_z", 0.0)])
    with pytest.raises(InputError, match=r"no hook point 'blocks\.0\.attn\.hook_nothing'"):
        ConditionEditor(hybrid, [Edit("blocks.{layer}.attn.hook_nothing", 0.0)])


def test_wrong_arguments_of_applied_are_named(lens: Any) -> None:
    for arguments, name in (
        ((None, [Edit(MLP, 0.0)], None), "expected lens as"),
        ((lens, 3, None), "edits"),
        ((lens, [Edit(MLP, 0.0)], [[0, 1]]), "expected batch as a Batch"),
    ):
        with pytest.raises(InputError, match=name):
            applied(arguments[0], arguments[1], batch=arguments[2])  # type: ignore[arg-type]
