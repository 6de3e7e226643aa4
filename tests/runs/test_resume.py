"""Branches of one pass: each forward is that of the whole model under plain hooks, and shares what it can."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import phaselens
from phaselens.plugin import Batch, Edit
from phaselens.runs import applied
from phaselens.runs.condition_editor import ConditionEditor
from phaselens.runs.resume import FROM_TOKENS, Branch, lowest_layer, run_branches
from tests.toys import toy_lens

TOKENS = torch.tensor([[0, 5, 9, 13, 21], [0, 8, 30, 0, 0]])
LENGTHS = (5, 3)
N_LAYERS = 3


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(num_hidden_layers=N_LAYERS, dtype=torch.float64)


def batch() -> Batch:
    return Batch(("a", "b"), (0, 1), LENGTHS, TOKENS)


def half(point: str, *positions: int) -> Edit:
    return Edit(point, lambda tensor, site: tensor * 0.5 + 0.1, positions or None)


def branch_of(lens: Any, *edits: Edit, finals: list[Tensor], reading: Any = None) -> Branch:
    return Branch(ConditionEditor(lens, edits, batch()), finals.append, lambda run: run(), reading)


def expected_under(lens: Any, *edits: Edit) -> Tensor:
    """The final norm's output of a whole forward; `applied` does not resume."""
    with applied(lens, edits, batch=batch()):
        output: Tensor = lens.stream(TOKENS, lengths=torch.tensor(LENGTHS))
    return output


def require_real_rows_close(values: Tensor, expected: Tensor) -> None:
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(values[row, :length], expected[row, :length], atol=1e-12, rtol=0)


#: Edits of several layers at once, above and below what a branch can take from the baseline.
CASES = {
    "embedding": [half("hook_embed", 0)],
    "final norm": [half("ln_final.hook_out", 1)],
    "embedding and last layer": [half("blocks.2.hook_mlp_out"), half("hook_embed")],
    "mlp and final norm": [half("blocks.1.hook_mlp_out", 0), half("ln_final.hook_out")],
    "mlp twice": [half("blocks.1.hook_mlp_out"), half("blocks.1.hook_mlp_out", 0)],
    "mlp and resid_post": [half("blocks.1.hook_resid_post", 2), half("blocks.1.hook_mlp_out", 1)],
    "resid_post": [half("blocks.1.hook_resid_post", 0)],
    "resid_post of the last layer": [half("blocks.2.hook_resid_post", 0)],
    "mlp and the layer above": [half("blocks.0.hook_mlp_out", 0), half("blocks.1.attn.hook_q")],
    "attention and mlp": [half("blocks.1.attn.hook_v", 0), half("blocks.1.hook_mlp_out", 0)],
    "scores": [half("blocks.1.attn.hook_attn_scores")],
    "pattern": [half("blocks.1.attn.hook_pattern", 2)],
    "z and mid": [half("blocks.1.attn.hook_z"), half("blocks.1.hook_resid_mid")],
    "mid": [half("blocks.2.hook_resid_mid", 1)],
    "resid_post beyond the texts": [half("blocks.1.hook_resid_post", 99)],
    "beyond the texts": [half("blocks.1.hook_mlp_out", 99)],
    "beyond the texts, and resid_post": [half("blocks.1.hook_mlp_out", 99), half("blocks.1.hook_resid_post", 1)],
}  # fmt: skip


def test_all_branches_together_equal_whole_forwards(lens: Any) -> None:
    finals: dict[str, list[Tensor]] = {name: [] for name in CASES}
    branches = [branch_of(lens, *edits, finals=finals[name]) for name, edits in CASES.items()]
    baseline = run_branches(lens, batch(), branches)
    require_real_rows_close(baseline, lens.stream(TOKENS, lengths=torch.tensor(LENGTHS)))
    for name, edits in CASES.items():
        (final,) = finals[name]
        require_real_rows_close(final, expected_under(lens, *edits))


@pytest.mark.parametrize("name", CASES)
def test_a_branch_alone_equals_a_whole_forward(lens: Any, name: str) -> None:
    finals: list[Tensor] = []
    unedited = run_branches(lens, batch(), [branch_of(lens, *CASES[name], finals=finals)], finals.append)
    assert finals[0] is unedited
    require_real_rows_close(unedited, lens.stream(TOKENS, lengths=torch.tensor(LENGTHS)))
    require_real_rows_close(finals[1], expected_under(lens, *CASES[name]))


@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize("point", ["attn.hook_v", "hook_mlp_out"])
def test_the_baseline_goes_on_from_any_layer(lens: Any, layer: int, point: str) -> None:
    expected = lens.stream(TOKENS, lengths=torch.tensor(LENGTHS))
    branches = [branch_of(lens, half(f"blocks.{layer}.{point}", 0), finals=[])]
    require_real_rows_close(run_branches(lens, batch(), branches), expected)


def recorded_streams(lens: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int | None, int | None]]:
    """Return a list that gets, of each forward, whether it starts from the tokens, its first layer, and its end."""
    streams: list[tuple[bool, int | None, int | None]] = []
    stream = type(lens).stream

    def record_stream(self: Any, tokens: Any = None, hooks: Any = (), **options: Any) -> Any:
        streams.append((tokens is TOKENS, options.get("start_at_layer"), options.get("stop_at_layer")))
        return stream(self, tokens, hooks, **options)

    monkeypatch.setattr(type(lens), "stream", record_stream)
    return streams


def test_the_unedited_output_is_received_first_without_repeating_layers(
    lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = recorded_streams(lens, monkeypatch)
    finals: list[Tensor] = []
    edits = [half("hook_embed", 0), half("blocks.1.attn.hook_q", 1), half("blocks.1.attn.hook_q", 2)]
    branches = [branch_of(lens, edit, finals=finals) for edit in edits]
    unedited = run_branches(lens, batch(), branches, finals.append)
    assert streams == [
        (True, None, 1),  # up to the lowest layer of a branch that resumes
        (False, 1, None),
        (True, None, None),
        (False, 1, None),
        (False, 1, None),
    ]
    assert finals[0] is unedited
    assert len(finals) == 4


def test_a_model_that_cannot_resume_runs_whole_forwards(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens, "resume_problem", "layers share a state")
    streams = recorded_streams(lens, monkeypatch)
    finals: list[Tensor] = []
    edits = [half("blocks.1.hook_mlp_out", 0), half("blocks.2.attn.hook_v", 1)]
    baseline = run_branches(lens, batch(), [branch_of(lens, edit, finals=finals) for edit in edits])
    assert streams == [(True, None, None)] * 3
    require_real_rows_close(baseline, lens.stream(TOKENS, lengths=torch.tensor(LENGTHS)))
    for edit, final in zip(edits, finals, strict=True):
        require_real_rows_close(final, expected_under(lens, edit))


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "gemma2"])
def test_layers_of_other_forms_resume_exactly(family: str) -> None:
    """Parallel attention and MLP, and norms behind the MLP, after which a layer is not the sum of its parts."""
    lens = toy_lens(family, dtype=torch.float64)
    points = ["hook_mlp_out", "hook_resid_post", "hook_attn_out", "attn.hook_z", "attn.hook_v"]
    edits = [half(f"blocks.0.{point}", 1) for point in points if lens.find_hook(f"blocks.0.{point}")]
    finals: list[list[Tensor]] = [[] for _ in edits]
    branches = [branch_of(lens, edit, finals=kept) for edit, kept in zip(edits, finals, strict=True)]
    run_branches(lens, batch(), branches)
    for edit, (final,) in zip(edits, finals, strict=True):
        require_real_rows_close(final, expected_under(lens, edit))


def test_the_lowest_layer_of_an_edit() -> None:
    assert lowest_layer(half("blocks.2.hook_mlp_out"), 4) == 2
    assert lowest_layer(half("blocks.0.hook_mlp_out"), 4) == 0
    assert lowest_layer(half("ln_final.hook_out"), 4) == 4
    assert lowest_layer(half("hook_embed"), 4) == FROM_TOKENS < 0


def count_calls(lens: Any, *edits: Edit) -> Counter[str]:
    """The forwards of each projection, MLP and attention of layer 1 in a pass with one branch per edit."""
    counter: Counter[str] = Counter()
    block = lens.blocks[1]
    modules = {"q_proj": "q", "o_proj": "o", "down_proj": "mlp"}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=short: counter.update([name]))
        for path, module in block.named_modules()
        for suffix, short in modules.items()
        if path.endswith(f"{suffix}.original_component") or path.endswith(f"original_component.{suffix}")
    ]
    run_branches(lens, batch(), [branch_of(lens, edit, finals=[]) for edit in edits])
    for handle in handles:
        handle.remove()
    return counter


def test_branches_share_what_their_edits_leave_unchanged(lens: Any) -> None:
    def repeats(point: str) -> Counter[str]:
        once, thrice = (
            count_calls(lens, *[half(f"blocks.1.{point}", 1 + n) for n in range(count)]) for count in (1, 3)
        )
        return Counter({name: thrice[name] - once[name] for name in thrice if thrice[name] - once[name]})

    assert set(repeats("attn.hook_v")) == {"q", "o", "mlp"}
    assert set(repeats("attn.hook_z")) == {"q", "o", "mlp"}
    assert set(repeats("hook_attn_out")) == {"mlp"}
    assert set(repeats("hook_mlp_out")) == set()


def test_a_layer_that_is_not_the_sum_of_its_parts_runs_again(lens: Any) -> None:
    """Where the stream after a layer is not exactly its middle plus the MLP's output, its MLP is not left out."""
    edit = half("blocks.1.hook_mlp_out", 1)

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01

    handle = lens.blocks[1].original_component.register_forward_hook(spoil)
    try:
        finals: list[Tensor] = []
        run_branches(lens, batch(), [branch_of(lens, edit, finals=finals)])
        require_real_rows_close(finals[0], expected_under(lens, edit))
    finally:
        handle.remove()


def test_a_guard_that_does_not_run_its_function_leaves_other_branches_alone(lens: Any) -> None:
    finals: list[Tensor] = []
    edit = half("blocks.1.hook_mlp_out", 1)
    idle = Branch(ConditionEditor(lens, [edit], batch()), finals.append, lambda run: None)
    run_branches(lens, batch(), [idle, branch_of(lens, edit, finals=finals)])
    assert len(finals) == 1
    require_real_rows_close(finals[0], expected_under(lens, edit))


def test_a_resumed_layer_rotates_each_text_by_its_length() -> None:
    from tests.lens.test_frequencies import N_CTX, fresh, padded, text

    lens = phaselens.load(fresh("dynamic"), check=False)
    lengths = (20, 2 * N_CTX)
    texts = Batch(("a", "b"), (0, 1), lengths, padded(list(lengths)))
    finals: dict[str, list[Tensor]] = {"blocks.1.attn.hook_v": [], "hook_embed": []}
    branches = [
        Branch(ConditionEditor(lens, [half(point, 0)], texts), kept.append, lambda run: run())
        for point, kept in finals.items()
    ]
    baseline = run_branches(lens, texts, branches)
    model = phaselens.load(fresh("dynamic"), check=False)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(baseline[row, :length], model.stream(text(length))[0], atol=1e-5, rtol=0)
        for point, (final,) in finals.items():
            with applied(model, [half(point, 0)]):
                edited = model.stream(text(length))[0]
            torch.testing.assert_close(final[row, :length], edited, atol=1e-5, rtol=0)
