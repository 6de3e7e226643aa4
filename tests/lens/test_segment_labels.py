"""Segments of keys in forwards: with pads, with a cache, and put back at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import InputError
from phaselens.testing import tiny_lens

POINT = "blocks.{}.attn.hook_segments"
TOKENS = torch.tensor([[0, 31, 26, 3, 13, 16, 9, 40], [0, 9, 40, 13, 5, 1, 1, 1]])
LABELS = torch.tensor([[0, 1, 1, 2, 2, 2, 0, -1], [2, 2, 0, 0, 1, -1, -1, -1]])


def captured(lens: Any, run: Any, *points: str) -> list[Tensor]:
    """Return what fires at these points while `run` runs the model, in order."""
    fired: list[Tensor] = []
    with lens.hooks(fwd_hooks=[(point, lambda value, hook: fired.append(value.clone())) for point in points]):
        run()
    return fired


def expected_mass(pattern: Tensor, labels: Tensor, n: int) -> Tensor:
    return torch.stack([(pattern * (labels == s)[:, None, None, :]).sum(-1) for s in range(n)], -1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gpt-oss", "gemma2"])
def test_each_text_has_its_own_segments(family: str) -> None:
    lens = tiny_lens(family, dtype=torch.float64)
    for layer in range(2):
        name = POINT.format(layer)
        (pattern,) = captured(lens, lambda: lens.stream(TOKENS), f"blocks.{layer}.attn.hook_pattern")
        with lens.segmented(LABELS):
            (mass,) = captured(lens, lambda: lens.stream(TOKENS), name)
            with_matrix = captured(
                lens, lambda: lens.stream(TOKENS), name, f"blocks.{layer}.attn.hook_pattern"
            )
        torch.testing.assert_close(mass, expected_mass(pattern, LABELS, 3), rtol=0, atol=1e-10)
        (same,) = [value for value in with_matrix if value.shape == mass.shape]
        torch.testing.assert_close(same, mass, rtol=0, atol=1e-10)


def test_without_labels_all_keys_are_in_one_segment() -> None:
    lens = tiny_lens("llama")
    (mass,) = captured(lens, lambda: lens.stream(TOKENS), POINT.format(0))
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_the_segments_end_with_the_context_even_after_an_error() -> None:
    lens = tiny_lens("llama")
    with pytest.raises(RuntimeError), lens.segmented(LABELS):
        raise RuntimeError
    (mass,) = captured(lens, lambda: lens.stream(TOKENS), POINT.format(0))
    assert mass.shape[-1] == 1
    with lens.segmented(LABELS, 5):
        with lens.segmented(None):
            assert captured(lens, lambda: lens.stream(TOKENS), POINT.format(0))[0].shape[-1] == 1
        assert captured(lens, lambda: lens.stream(TOKENS), POINT.format(0))[0].shape[-1] == 5


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_segments_are_those_of_absolute_positions_with_a_cache_and_left_pads(family: str) -> None:
    """Positions beyond the labels, such as those of generated tokens, are in no segment."""
    lens = tiny_lens(family, dtype=torch.float64)
    labels = LABELS[:1, :6]
    with lens.segmented(labels, 3):
        masses, tops = captured(
            lens,
            lambda: lens.stream(TOKENS[:1]),
            POINT.format(1),
            POINT.format(1).replace("segments", "top_key"),
        )
        model = lens.original_model
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1]], 1)
        mask = torch.tensor([[0, 0, 0] + [1] * 8])

        def in_two_calls() -> None:
            cache = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True).past_key_values
            model(padded[:, 7:], attention_mask=mask, past_key_values=cache)

        for point, expected in (
            (POINT.format(1), masses),
            (POINT.format(1).replace("segments", "top_key"), tops),
        ):
            joined = torch.cat(captured(lens, in_two_calls, point), 2)[:, :, 3:]
            torch.testing.assert_close(joined, expected, rtol=0, atol=1e-5)
    assert bool((masses[0, :, -1].sum(-1) < 1).all())


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_both_statistics_follow_an_edit_of_the_matrix(point: str) -> None:
    lens = tiny_lens("llama", dtype=torch.float64)

    def to_key_3(matrix: Tensor, hook: object) -> Tensor:
        edited = torch.full_like(matrix, -torch.inf if point == "hook_attn_scores" else 0.0)
        edited[..., 3] = 0.0 if point == "hook_attn_scores" else 1.0
        return edited

    edit = (f"blocks.0.attn.{point}", to_key_3)
    fired: dict[str, Tensor] = {}
    names = [f"blocks.0.attn.{name}" for name in ("hook_segments", "hook_top_key")]
    hooks = [edit, *((name, lambda value, hook, name=name: fired.update({name: value})) for name in names)]
    with lens.segmented(LABELS[:1]):
        lens.stream(TOKENS[:1], hooks)
    assert fired[names[0]][0, 0, 5].tolist() == [0.0, 0.0, 1.0]
    assert fired[names[1]][0, 0, 5].tolist() == [3.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 4),), r"segments as a tensor \[batch or 1, position\] of .* received torch.float32"),
        (([[0, 1]],), "received list"),
        ((torch.zeros(4, dtype=torch.long),), r"received \[4\]"),
        ((LABELS, 0), "n_segments as a whole number of at least 1, received 0"),
    ],
)  # fmt: skip
def test_segments_of_another_kind_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message), tiny_lens("llama").segmented(*arguments):
        pass
