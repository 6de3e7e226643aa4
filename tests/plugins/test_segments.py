"""Attention of the last queries by segment against the matrix, planted heads, prompts, windows and hostile input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import Batch
from phaselens.runs import Run
from phaselens.testing import check_metric, tiny_lens
from phaselens_plugins._encoding import PromptEncoder
from phaselens_plugins._passkeys import PasskeyCase
from phaselens_plugins._segment_prompts import N_EDGE, SEGMENTS, SegmentPrompt, SegmentWriter
from phaselens_plugins.segments import Segments, SegmentsParams
from tests.plugins.views import info, rows, view

PARAMS = {"symbols": "abcdefghij", "lengths": "290, 330", "n": 1, "depths": "0, 0.5, 1"}


def run(lens: Any, **params: Any) -> Run:
    result = phaselens.run(lens, metrics=[("segments", PARAMS | params)], texts=["a"])
    assert not result.failed, [str(failure) for failure in result.metrics["segments"].failures]
    return result


def records(result: Run, table: str, **chosen: Any) -> list[dict[str, Any]]:
    all_rows = result.rows("segments", table).records()
    return [row for row in all_rows if all(row[name] == value for name, value in chosen.items())]


def prompts_of(lens: Any, **params: Any) -> list[SegmentPrompt]:
    """Return the prompts that the metric reads."""
    metric = Segments(lens.info, SegmentsParams.parse(PARAMS | params))
    texts = Batch(("a",), (0,), (1,), torch.zeros(1, 1, dtype=torch.long))
    metric.sequences(texts, lens.text_tokenizer)
    return list(metric.prompts.values())


def writer_of(lens: Any, **options: Any) -> SegmentWriter:
    encode = PromptEncoder(lens.text_tokenizer, bos="auto", bos_token_id=lens.info.bos_token_id)
    return SegmentWriter(
        encode, **{"digits": 5, "symbols": "abcdefghij", "n_distractors": 3, "seed": 0} | options
    )


# --- prompts


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_each_token_is_in_the_segment_of_what_it_says(depth: float) -> None:
    lens = tiny_lens("llama")
    prompt = writer_of(lens).write(PasskeyCase(400, depth, 0))
    assert prompt is not None
    text_of = {
        name: lens.text_tokenizer.decode(
            [i for i, s in zip(prompt.ids, prompt.segments, strict=False) if s == index]
        )
        for index, name in enumerate(SEGMENTS)
    }
    key = lens.text_tokenizer.decode(prompt.ids[prompt.key_at :][:6]).strip()
    assert len(prompt.ids) == 400
    assert text_of["begin"] == "<s>"
    assert text_of["needle"].strip() == f"The secret number is {key[:5]}."
    assert text_of["distractors"].count("number is") == 3
    assert key not in text_of["distractors"]
    assert text_of["recent"].endswith("The secret number is")
    assert prompt.segments.count(SEGMENTS.index("first")) == N_EDGE - 1
    assert prompt.segments.count(SEGMENTS.index("recent")) == N_EDGE
    assert prompt.segments[prompt.scored_from :] == (-1,) * (400 - prompt.scored_from)
    assert -1 not in prompt.segments[: prompt.scored_from]
    share = prompt.key_at / prompt.scored_from
    assert (depth == 0 and share < 0.45) or (depth == 1 and share > 0.6) or depth == 0.5


def test_a_query_copies_the_token_of_the_needle_that_it_predicts() -> None:
    lens = tiny_lens("llama")
    prompt = writer_of(lens).write(PasskeyCase(400, 0.5, 1))
    assert prompt is not None
    assert prompt.is_copied
    for query in range(prompt.scored_from - 1, len(prompt.ids) - 1):
        position = prompt.copied_position(query)
        assert position is not None
        assert prompt.ids[position] == prompt.ids[query + 1]
        assert prompt.segments[position] == SEGMENTS.index("needle")
    assert prompt.copied_position(prompt.scored_from - 2) is None
    assert prompt.copied_position(len(prompt.ids) - 1) is None


def test_distractors_have_other_keys_and_none_are_an_option() -> None:
    lens = tiny_lens("llama")
    for number in range(4):
        prompt = writer_of(lens, digits=1, symbols="abcd").write(PasskeyCase(400, 0.5, number))
        assert prompt is not None
        text = lens.text_tokenizer.decode(prompt.ids)
        keys = [part[:2] for part in text.split("number is")[1:-1]]
        assert len(keys) == len(set(keys)) == 4
    without = writer_of(lens, n_distractors=0).write(PasskeyCase(300, 0.5, 0))
    assert without is not None
    assert SEGMENTS.index("distractors") not in without.segments


# --- against the matrix


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("mistral", marks=pytest.mark.slow), "gpt-oss"])
def test_masses_and_retrieval_equal_those_of_the_matrix(family: str) -> None:
    lens = tiny_lens(family, dtype=torch.float64)
    result = run(lens)
    prompts = prompts_of(lens)
    for layer in range(2):
        mass, null, hits = [], [], []
        window = lens.info.windows[layer]
        for prompt in prompts:
            patterns: list[np.ndarray] = []
            point = f"blocks.{layer}.attn.hook_pattern"
            lens.stream(
                torch.tensor([prompt.ids]), [(point, lambda p, hook, out=patterns: out.append(p[0].numpy()))]
            )
            (pattern,) = patterns
            labels = np.array(prompt.segments)
            queries = range(prompt.scored_from - 8, prompt.scored_from)
            mass.append([pattern[:, queries][..., labels == s].sum(-1).mean(1) for s in range(6)])
            visible = [[k for k in range(q + 1) if window is None or k > q - window] for q in queries]
            null.append([np.mean([np.mean(labels[keys] == s) for keys in visible]) for s in range(6)])
            largest = [
                pattern[:, query].argmax(-1) == prompt.key_at + step
                for step, query in enumerate(range(prompt.scored_from - 1, len(prompt.ids) - 1))
                if window is None or prompt.key_at + step > query - window
            ]
            hits.append(np.mean(largest, 0) if largest else np.full(4, np.nan))
        means, nulls = np.mean(mass, 0), np.mean(null, 0)
        for row in records(result, "heads", layer=layer):
            for segment, name in enumerate(SEGMENTS):
                assert row[name] == pytest.approx(means[segment, row["head"]], abs=1e-9)
                assert row["null" if name == "needle" else f"{name}_null"] == pytest.approx(nulls[segment])
            expected = np.array(hits)[:, row["head"]]
            if np.isnan(expected).all():
                assert row["retrieval"] is None
            else:
                assert row["retrieval"] == pytest.approx(np.nanmean(expected))
            assert row["n_prompts"] == 6
            if family == "llama-gqa":
                assert sum(row[name] for name in SEGMENTS) == pytest.approx(1)
    assert not [note for note in result.warnings if "off from 1" in note]


def test_tables_by_cell_and_length_are_means_over_their_prompts() -> None:
    lens = tiny_lens("llama")
    result = run(lens)
    cells = records(result, "cells", layer=1)
    assert [(row["length"], row["depth"], row["n_prompts"]) for row in cells] == [
        (length, depth, 1) for length in (290, 330) for depth in (0.0, 0.5, 1.0)
    ]
    (layer,) = records(result, "layers", layer=1)
    for name in ("needle", "begin", "distractors", "recent", "rest", "null", "begin_null"):
        assert np.mean([row[name] for row in cells]) == pytest.approx(layer[name], rel=1e-6)
    lengths = records(result, "lengths", layer=1, head=2)
    (head,) = records(result, "heads", layer=1, head=2)
    for name in ("needle", "null", "retrieval"):
        assert np.mean([row[name] for row in lengths]) == pytest.approx(head[name], rel=1e-6)
    heads = records(result, "heads", layer=1)
    assert layer["needle"] == pytest.approx(np.mean([row["needle"] for row in heads]))
    assert layer["retrieval"] == max(row["retrieval"] for row in heads)
    assert [row["n_needle"] for row in records(result, "prompts")] == [
        prompt.segments.count(2) for prompt in prompts_of(lens)
    ]
    best = max(heads, key=lambda row: row["retrieval"])
    names = ("retrieval", "retrieval_low", "retrieval_high")
    assert [layer[name] for name in names] == [best[name] for name in names]
    assert {row["retrieval_head"] for row in cells} == {layer["retrieval_head"]}


@pytest.mark.slow
def test_the_figure_is_a_grid_of_depths_and_lengths_for_each_model() -> None:
    lenses = [tiny_lens("llama"), tiny_lens("llama-drope-nope")]
    result = phaselens.run(lenses, metrics=[("segments", PARAMS)], texts=["a"])
    figure = Figure()
    Segments.plot(result.metrics["segments"].tables, figure)
    (summary,) = records(result, "summary", model="llama-drope-nope")
    cells = records(result, "cells", model="llama-drope-nope", layer=summary["needle_layer"])
    (image,) = figure.axes[3].images
    by_depth = [[row["needle"] for row in cells if row["depth"] == depth] for depth in (0.0, 0.5, 1.0)]
    assert np.asarray(image.get_array()).tolist() == pytest.approx(np.array(by_depth))


# --- planted truths


def planted(prompt: SegmentPrompt, top: torch.Tensor, mass: torch.Tensor, **facts: Any) -> Segments:
    """Return a metric of one layer and two heads that has seen this prompt with these statistics."""
    metric = Segments(info(**facts), SegmentsParams(lengths="13", depths="0.5", queries=2))
    metric.prompts = {"a": prompt}
    statistics = {
        "attn.hook_segments": mass,
        "attn.hook_top_key": top,
        "attn.hook_learned_sink": torch.zeros(mass.shape[:3]),
    }
    layer = view({"tokens": torch.zeros(1, len(prompt.ids))}, (len(prompt.ids),))
    metric.update(replace(layer, activations=statistics))
    return metric


def hand_made_prompt() -> SegmentPrompt:
    segments = (0, 1, 1, 2, 2, 2, 3, 5, 5, 4, 4, -1, -1)
    return SegmentPrompt(PasskeyCase(13, 0.5, 0), tuple(range(13)), segments, 11, 3, True)


def test_a_head_that_copies_has_the_score_1_and_its_ties_are_counted() -> None:
    """Queries 10 and 11 predict the answer, which stands at positions 3 and 4."""
    prompt = hand_made_prompt()
    top = torch.zeros(1, 2, 13, 2)
    top[..., 1] = 1.0
    top[0, 0, 10, 0], top[0, 0, 11, 0] = 3.0, 4.0
    top[0, 1, 10, 0], top[0, 1, 11, 0] = 3.0, 3.0
    top[0, 1, 11, 1] = 2.0
    mass = torch.zeros(1, 2, 13, 6)
    mass[0, 0, :, 2] = 1.0
    mass[0, 1, :, 0] = 1.0
    metric = planted(prompt, top, mass)
    copier, follower = rows(metric, "heads")
    assert (copier["retrieval"], copier["ties"], copier["needle"], copier["begin"]) == (1.0, 0.0, 1.0, 0.0)
    assert (follower["retrieval"], follower["ties"], follower["needle"], follower["begin"]) == (
        0.5,
        0.5,
        0.0,
        1.0,
    )
    assert copier["retrieval_null"] == pytest.approx((1 / 11 + 1 / 12) / 2)
    (summary,) = rows(metric, "summary")
    assert (summary["retrieval_layer"], summary["retrieval_head"], summary["retrieval_heads"]) == (0, 0, 1.0)
    (layer,) = rows(metric, "layers")
    assert (layer["retrieval"], layer["retrieval_head"], layer["needle"]) == (1.0, 0, 0.5)


def test_masses_that_do_not_sum_to_1_are_reported() -> None:
    mass = torch.zeros(1, 2, 13, 6)
    mass[..., 5] = 0.9
    metric = planted(hand_made_prompt(), torch.ones(1, 2, 13, 2), mass)
    assert any("off from 1 by up to 0.1" in note for note in metric.warnings)


def test_a_query_that_cannot_see_the_key_has_no_retrieval() -> None:
    mass = torch.zeros(1, 2, 13, 6)
    mass[..., 4] = 1.0
    metric = planted(hand_made_prompt(), torch.ones(1, 2, 13, 2), mass, windows=(5,))
    for row in rows(metric, "heads"):
        assert (row["retrieval"], row["retrieval_null"], row["n_copied"]) == (None, None, 0)
        assert row["begin_null"] == 0.0
    assert any("retrieval is missing in layer 0 for 1 prompts" in note for note in metric.warnings)


def test_attention_that_is_nan_is_missing_with_its_reason() -> None:
    mass, top = torch.full((1, 2, 13, 6), torch.nan), torch.full((1, 2, 13, 2), torch.nan)
    metric = planted(hand_made_prompt(), top, mass)
    for row in rows(metric, "heads"):
        assert (row["needle"], row["retrieval"]) == (None, None)
    assert any("it is NaN in layer 0" in note for note in metric.warnings)


# --- hostile input


@pytest.mark.slow
def test_lengths_that_are_too_short_are_named() -> None:
    result = phaselens.run(
        tiny_lens("llama"), metrics=[("segments", PARAMS | {"lengths": "20, 300"})], texts=["a"]
    )
    assert any(
        "prompts of 20 tokens are missing: shorter than the question" in note for note in result.warnings
    )
    assert {row["length"] for row in records(result, "cells")} == {300}
    failed = phaselens.run(
        tiny_lens("llama"), metrics=[("segments", PARAMS | {"lengths": "20"})], texts=["a"]
    )
    (failure,) = failed.metrics["segments"].failures
    assert "no prompt of these lengths can be made" in str(failure)


@pytest.mark.slow
def test_lengths_beyond_learned_positions_and_the_limit_are_left_out() -> None:
    lens = tiny_lens("gpt2", max_position_embeddings=300)
    result = run(lens, lengths="n_ctx, 2*n_ctx")
    assert any(
        "prompts of 600 tokens are missing: the model has learned positions for 300" in n
        for n in result.warnings
    )
    limited = run(tiny_lens("llama"), lengths="290, 320", longest=300)
    assert any(
        "prompts of 320 tokens are missing: more than -P segments.longest=300" in n for n in limited.warnings
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"symbols": "a"}, "give two or more different characters"),
        (
            {"symbols": "ab", "digits": 1, "distractors": 3},
            "1 of 'ab' give 2 keys, too few for 3 distractors",
        ),
        ({"depths": "2"}, "write numbers from 0"),
        ({"distractors": 9}, "distractors is 9; give a whole number, 0 to 8"),
    ],
)
def test_parameters_that_cannot_be_served_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentsParams.parse(params)


def test_the_prompts_are_the_same_for_models_with_one_tokenizer() -> None:
    rope, drope = tiny_lens("llama"), tiny_lens("llama-drope-nope")
    assert prompts_of(rope) == prompts_of(drope)
    assert prompts_of(rope) != prompts_of(rope, depths="0, 0.4, 1")


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(Segments, PARAMS | {"lengths": "290"})
