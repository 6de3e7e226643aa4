"""Knowledge tasks: options scored by probability, accuracy lost under a condition, and files that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phaselens.errors import InputError
from phaselens.plugin import BASELINE, Condition, EditEffect, TextOutcome
from phaselens.testing import check_metric, tiny_lens, tiny_tokenizer
from phaselens.testing._checks import require_same
from phaselens_plugins._encoding import PromptEncoder, shared_prefix_length
from phaselens_plugins._questions import Question, read_questions
from phaselens_plugins._scores import (
    chance_accuracy,
    difference_of_means,
    same_answer_accuracy,
    score_options,
)
from phaselens_plugins.knowledge import Knowledge, KnowledgeParams
from tests.plugins import ablations
from tests.plugins.task_models import COLOURS, installed_silence, repeater, word_tokenizer
from tests.plugins.views import info

TEXTS = ["the man went home", "it was late"]

#: The planted network predicts `blue` after `sky`, and otherwise the colour in its text.
PLANTED: list[dict[str, Any]] = [
    {
        "id": f"boat {colour}",
        "kind": "contextual",
        "context": f"The boat is {colour}.",
        "prompt": "The colour of the boat is",
        "options": ["green", "red", "black"],
        "answer": index,
    }
    for index, colour in enumerate(("green", "red", "black"))
] + [
    {"id": f"sky {n}", "kind": "parametric", "prompt": f"{'So, ' * n} the colour of the sky", "options": options,
     "answer": options.index("blue")}
    for n, options in enumerate((["blue", "red"], ["green", "blue"], ["white", "blue"]))
]  # fmt: skip

LETTERS: list[dict[str, Any]] = [
    {"kind": "parametric", "prompt": "is it so? ", "options": ["yes", "no"], "answer": 0},
    {"kind": "parametric", "prompt": "to be or", "options": ["not to be", "never", "now", "no"], "answer": 0},
    {
        "kind": "contextual",
        "context": "the cat is asleep.",
        "prompt": "who is asleep?\n",
        "options": ["the cat", "the dog"],
        "answer": 1,
    },
    {"kind": "contextual", "prompt": "a b a b a", "options": ["b", "a", "c"], "answer": 0},
]


def write(folder: Path, items: Sequence[Mapping[str, Any]], name: str = "questions.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def run(lens: Any, file: str, options: Mapping[str, Any] | None = None, **values: Any) -> Any:
    return ablations.run("knowledge", lens, TEXTS, params={"file": file, **values}, **(options or {}))


def rows(result: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(result, "knowledge", table)


@pytest.fixture(scope="module")
def planted() -> Any:
    return repeater()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_lens("llama", dtype=torch.float64)


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[None]:
    yield from installed_silence(tmp_path)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_an_options_log_probability_equals_that_of_a_whole_forward(tiny: Any, tmp_path: Path) -> None:
    """The reference sums over the option's tokens, white space included, from a plain forward of the model."""
    records = rows(run(tiny, write(tmp_path, LETTERS)), "items")
    encode = tiny_tokenizer()
    for row, item in zip(records, LETTERS, strict=True):
        context = item.get("context")
        full_prompt = (f"{context}\n\n" if context else "") + item["prompt"]
        question = full_prompt.rstrip()
        gap = full_prompt[len(question) :] or " "
        sums, means = [], []
        for option in item["options"]:
            start = len(encode(question)["input_ids"])
            ids = encode(question + gap + option)["input_ids"]
            with torch.no_grad():
                logits = tiny.original_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            token_log_p = [float(logits[position - 1, ids[position]]) for position in range(start, len(ids))]
            sums.append(sum(token_log_p))
            means.append(sum(token_log_p) / len(token_log_p))
        answer = item["answer"]
        p = math.exp(sums[answer]) / sum(map(math.exp, sums))
        assert row["p"] == pytest.approx(p, rel=1e-6, abs=1e-12)
        assert row["log_odds"] == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
        assert row["p_per_token"] == pytest.approx(
            math.exp(means[answer]) / sum(map(math.exp, means)), rel=1e-6
        )
        assert row["chosen"] == item["options"][int(np.argmax(sums))]
        assert row["correct"] == (int(np.argmax(sums)) == answer)
        assert row["correct_per_token"] == (int(np.argmax(means)) == answer)
        assert row["chance"] == 1 / len(sums)


@given(st.lists(st.tuples(st.floats(-700, 0), st.integers(1, 20)), min_size=2, max_size=6), st.data())
def test_scores_are_a_softmax_over_the_options(scores: list[tuple[float, int]], data: st.DataObject) -> None:
    sums, lengths = [total[0] for total in scores], [total[1] for total in scores]
    answer = data.draw(st.integers(0, len(sums) - 1))
    score = score_options(sums, lengths, answer)
    largest = max(sums)
    weights = [math.exp(total - largest) for total in sums]
    assert score.p == pytest.approx(weights[answer] / sum(weights), rel=1e-9, abs=1e-300)
    probabilities = [score_options(sums, lengths, option).p for option in range(len(sums))]
    assert sum(probabilities) == pytest.approx(1.0)
    assert score.chosen is None or sums[score.chosen] == largest


def test_options_with_the_same_first_token_are_distinguished() -> None:
    """The first token alone would give them the same probability."""
    assert score_options([-1.0 - 5.0, -1.0 - 0.1], [2, 2], 1).correct == 1.0
    encode = PromptEncoder(tiny_tokenizer())
    correct, corrupt = (encode(f"is it {word}") for word in ("correct", "corrupt"))
    assert shared_prefix_length(correct, corrupt) > len(encode("is it c")) - 1


def test_two_equal_options_are_not_an_answer() -> None:
    score = score_options([-2.0, -2.0, -3.0], [1, 1, 1], 0)
    assert (score.chosen, score.correct) == (None, 0.0)


class ScriptedKnowledge:
    """The metric, fed with log-probabilities of options written by hand."""

    def __init__(self, file: str, tokenizer: Any) -> None:
        self.metric = Knowledge(info(n_ctx=None), KnowledgeParams.parse({"file": file}))
        self.prompts = self.metric.prompts(tokenizer)

    def record(self, condition: Condition, *sums: Sequence[float]) -> None:
        """Record a sum for each option of each item, spread over its tokens."""
        option_sums = [option_sum for item in sums for option_sum in item]
        for index, (prompt, total) in enumerate(zip(self.prompts, option_sums, strict=True)):
            targets = np.array(prompt.ids[prompt.scored_from :])
            loss = np.full(len(targets), -total / len(targets))
            self.metric.record(
                condition, TextOutcome(prompt.id, index, f"{index}", len(prompt.ids), loss, targets, targets)
            )

    def table(self, name: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = self.metric.compute()[name].records()
        return records


def two_options(kind: str, answer: int = 0, options: Sequence[str] = ("yes", "no")) -> dict[str, Any]:
    return {"kind": kind, "prompt": "is it so?", "options": list(options), "answer": answer}


def test_an_option_that_contains_another_is_a_different_answer(tmp_path: Path) -> None:
    """A search of generated text for "correct" would match "incorrect", and "no" would match "not" and "know"."""
    items = [
        two_options("parametric", 0, ("correct", "incorrect")),
        two_options("parametric", 0, ("no", "know", "not")),
    ]
    scripted = ScriptedKnowledge(write(tmp_path, items), tiny_tokenizer())
    scripted.record(BASELINE, (-9.0, -1.0), (-9.0, -1.0, -8.0))
    assert [row["chosen"] for row in scripted.table("items")] == ["incorrect", "know"]
    assert scripted.table("accuracy")[0]["accuracy"] == 0.0
    assert any("one option is a prefix of another" in warning for warning in scripted.metric.warnings)


def test_items_without_a_score_stay_in_the_denominator(tmp_path: Path) -> None:
    """Accuracy over the scored items alone would be 1."""
    scripted = ScriptedKnowledge(write(tmp_path, [two_options("parametric")] * 4), tiny_tokenizer())
    nan = float("nan")
    scripted.record(BASELINE, (-1.0, -2.0), (nan, -2.0), (-1.0, nan), (nan, nan))
    row = scripted.table("accuracy")[0]
    assert (row["n"], row["coverage"], row["accuracy"]) == (4, 0.25, 0.25)
    assert sum("NaN or infinite for item" in warning for warning in scripted.metric.warnings) == 3


OFF = Condition("off", (), layer=0)


def declare(scripted: ScriptedKnowledge, *conditions: Condition) -> None:
    scripted.metric.losses.conditions = {condition.key: condition for condition in conditions}


def test_losses_are_paired_with_the_baseline_by_kind(tmp_path: Path) -> None:
    """Contextual items lose 2 nats each, parametric ones nothing; two answers of four are lost."""
    items = [*[two_options("contextual")] * 4, *[two_options("parametric")] * 4]
    scripted = ScriptedKnowledge(write(tmp_path, items), tiny_tokenizer())
    unedited = [(-1.0, -2.0 - n) for n in range(8)]
    edited = [(first - (2.0 if n < 4 else 0.0), second) for n, (first, second) in enumerate(unedited)]
    declare(scripted, OFF)
    scripted.record(BASELINE, *unedited)
    scripted.record(OFF, *edited)
    by_kind = {row["kind"]: row for row in scripted.table("degradation")}
    assert by_kind["contextual"]["lost_log_odds"] == pytest.approx(2.0)
    assert by_kind["contextual"]["log_odds_low"] == pytest.approx(2.0)
    assert (
        by_kind["contextual"]["lost_accuracy"] == 0.5
    )  # 2 nats turn the first answer, and make a tie of the second
    assert by_kind["parametric"]["lost_log_odds"] == by_kind["parametric"]["lost_accuracy"] == 0.0
    assert by_kind["parametric"]["accuracy_low"] is None  # no item changed
    difference = by_kind["contextual − parametric"]
    assert difference["lost_log_odds"] == pytest.approx(2.0)
    assert (difference["n"], difference["lost_accuracy"]) == (4, by_kind["contextual"]["lost_accuracy"])


def test_degradation_below_chance_is_flagged_and_has_no_share(tmp_path: Path) -> None:
    """A model that reverses all its answers has lost more than all: 100 × (1 − 0)/1 would look like a measurement."""
    scripted = ScriptedKnowledge(write(tmp_path, [two_options("parametric")] * 20), tiny_tokenizer())
    declare(scripted, OFF, half := Condition("half", ()))
    scripted.record(BASELINE, *[(-1.0, -2.0)] * 20)
    scripted.record(OFF, *[(-2.0, -1.0)] * 20)
    scripted.record(half, *[(-1.0, -2.0), (-1.0, -2.0), (-2.0, -1.0), (-1.0, -2.0)] * 5)
    degradation = {(row["condition"], row["kind"]): row for row in scripted.table("degradation")}
    assert degradation["off", "parametric"]["lost_accuracy"] == 1.0
    assert (degradation["off", "parametric"]["lost_of_all"], degradation["off", "parametric"]["status"]) == (
        None,
        "below chance",
    )
    assert (
        degradation["half", "parametric"]["lost_of_all"],
        degradation["half", "parametric"]["status"],
    ) == (0.5, "ok")
    assert any("below chance" in warning for warning in scripted.metric.warnings)


def test_a_baseline_at_chance_has_nothing_to_lose(tmp_path: Path) -> None:
    """With two options, half are right, and then one fewer: 100 × (base − after)/base would be 20 %."""
    scripted = ScriptedKnowledge(
        write(tmp_path, [two_options("parametric", n % 2) for n in range(10)]), tiny_tokenizer()
    )
    declare(scripted, OFF)
    scripted.record(BASELINE, *[(-1.0, -2.0)] * 10)
    scripted.record(OFF, (-2.0, -1.0), *[(-1.0, -2.0)] * 9)
    row = scripted.table("degradation")[0]
    assert (row["lost_of_all"], row["status"]) == (None, "baseline at chance")
    assert row["lost_accuracy"] == pytest.approx(0.1)
    accuracy = scripted.table("accuracy")[0]
    assert (accuracy["chance"], accuracy["same_answer"]) == (0.5, 0.5)


GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "tasks.json").read_text())["items"]


@pytest.mark.slow
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['model']} {row['task']}")
def test_published_degradations_of_a_baseline_at_chance_are_missing(
    row: dict[str, Any], tmp_path: Path
) -> None:
    """Each published value is 100 (before − after) / before; 0.16 → 0.51 on two-way questions became −219 %."""
    n, before, after = row["n"], row["baseline"], row["disrupted"]
    assert row["degradation"] == pytest.approx(100 * (before - after) / before, abs=0.1)
    scripted = ScriptedKnowledge(write(tmp_path, [two_options(row["kind"])] * n), tiny_tokenizer())
    declare(scripted, OFF)
    for condition, accuracy in ((BASELINE, before), (OFF, after)):
        n_right = round(n * accuracy)
        scripted.record(condition, *[(-1.0, -2.0)] * n_right, *[(-2.0, -1.0)] * (n - n_right))
    degradation = scripted.table("degradation")[0]
    assert degradation["lost_accuracy"] == pytest.approx(before - after)
    if before <= 0.5:
        assert (degradation["lost_of_all"], degradation["status"]) == (None, "baseline at chance")
    else:
        assert degradation["status"] == "ok"
        assert degradation["lost_of_all"] == pytest.approx((before - after) / (before - 0.5))


def test_repeats_of_a_control_are_averaged_item_by_item(tmp_path: Path) -> None:
    scripted = ScriptedKnowledge(write(tmp_path, [two_options("parametric")] * 4), tiny_tokenizer())
    repeats = [Condition("control", (), seed=seed) for seed in range(2)]
    declare(scripted, *repeats)
    scripted.record(BASELINE, *[(-1.0, -2.0)] * 4)
    scripted.record(repeats[0], *[(-1.0, -2.0)] * 4)
    scripted.record(repeats[1], *[(-2.0, -1.0)] * 4)
    row = next(row for row in scripted.table("accuracy") if row["of"] == "control")
    assert (row["accuracy"], row["n"], row["n_seeds"], row["log_odds"]) == (0.5, 4, 2, pytest.approx(0.0))
    degradation = scripted.table("degradation")
    assert [row["n"] for row in degradation] == [4, 4]


def test_a_condition_whose_edit_did_nothing_is_missing_in_every_table(tmp_path: Path) -> None:
    scripted = ScriptedKnowledge(
        write(tmp_path, [two_options("contextual"), two_options("parametric")]), tiny_tokenizer()
    )
    declare(scripted, OFF, idle := Condition("idle", ()))
    for condition in (BASELINE, OFF, idle):
        scripted.record(condition, (-1.0, -2.0), (-2.0, -1.0))
    scripted.metric.losses.add_effects(idle, {"blocks.0.hook_mlp_out": EditEffect(written=True)})
    assert [row["accuracy"] for row in scripted.table("accuracy") if row["of"] == "idle"] == [None] * 3
    degradation = [row for row in scripted.table("degradation") if row["condition"] == "idle"]
    assert [(row["n"], row["lost_accuracy"], row["status"]) for row in degradation] == [(0, None, None)] * 4
    assert any("idle is missing" in warning for warning in scripted.metric.warnings)


def test_chance_is_the_mean_over_items() -> None:
    items = [Question(f"{n}", "parametric", "?", tuple(COLOURS[:n]), 0) for n in (2, 4, 4)]
    assert chance_accuracy(items) == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    assert same_answer_accuracy(items) == 1.0


def test_a_difference_of_kinds_has_an_interval_over_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first_values, second_values = (
        generator.normal(1.0, 1.0, 40).tolist(),
        generator.normal(0.0, 1.0, 60).tolist(),
    )
    centre, low, high = difference_of_means(first_values, second_values, seed=0)
    assert low is not None
    assert high is not None
    assert centre == pytest.approx(np.mean(first_values) - np.mean(second_values))
    sd = math.sqrt(np.var(first_values) / 40 + np.var(second_values) / 60)
    assert (high - low) / 2 == pytest.approx(1.96 * sd, rel=0.1)
    assert difference_of_means([1.0], second_values, seed=0)[1:] == (None, None)
    assert difference_of_means([], second_values, seed=0) == (None, None, None)


# --- white space and tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "stem", "continuation"),
    [
        ("Is it?", "Is it?", " Yes"),
        ("Is it? ", "Is it?", " Yes"),
        ("Is it?\n", "Is it?", "\nYes"),
        ("Is it? \n ", "Is it?", " \n Yes"),
    ],
)
def test_an_option_follows_the_prompts_white_space_or_one_space(
    prompt: str, stem: str, continuation: str
) -> None:
    item = Question("a", "parametric", prompt, ("Yes", "No"), 0)
    assert (item.stem, item.continuation(0)) == (stem, continuation)


def test_a_context_precedes_the_prompt() -> None:
    item = Question("a", "contextual", "Is it?", ("Yes", "No"), 0, "It is. ")
    assert item.stem == "It is.\n\nIs it?"


def test_white_space_around_options_has_no_effect(tmp_path: Path) -> None:
    plain = read_questions(write(tmp_path, [two_options("parametric")]))
    spaced = read_questions(write(tmp_path, [two_options("parametric", 0, (" yes", "no "))], "spaced.jsonl"))
    assert plain.questions == spaced.questions


def merging() -> Any:
    """Return a tokenizer with the tokens `? y` and `? n`, which join an option with the end of the question."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", *sorted(set("is it so? yesno")), "?_", "? ", "? y", "? n"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[("?", " "), ("? ", "y"), ("? ", "n")],
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_options_that_merge_with_the_question_are_scored_from_the_same_token(tmp_path: Path) -> None:
    scripted = ScriptedKnowledge(write(tmp_path, [two_options("parametric")]), merging())
    assert len({prompt.scored_from for prompt in scripted.prompts}) == 1
    question = "is it so"
    assert scripted.prompts[0].scored_from == len(merging()(question)["input_ids"])
    assert any(
        "options change the tokens at the end of the question; its last 1" in warning
        for warning in scripted.metric.warnings
    )


def test_options_with_equal_tokens_count_as_wrong(tmp_path: Path) -> None:
    items = [
        two_options("parametric", 0, ("green", "red")),
        two_options("parametric", 0, ("cerise", "mauve")),
    ]
    scripted = ScriptedKnowledge(write(tmp_path, items), word_tokenizer())
    assert any("gives two of its options the same tokens" in warning for warning in scripted.metric.warnings)
    scripted.record(BASELINE, (-1.0, -2.0))
    row = scripted.table("accuracy")[0]
    assert (row["n"], row["coverage"], row["accuracy"]) == (2, 0.5, 0.5)


def test_max_tokens_does_not_cut_questions(tiny: Any, tmp_path: Path) -> None:
    file = write(tmp_path, LETTERS)
    assert rows(run(tiny, file), "items") == rows(run(tiny, file, {"max_tokens": 4}), "items")


def test_questions_beyond_learned_positions_are_not_scored(tmp_path: Path) -> None:
    lens = tiny_lens("gpt2", max_position_embeddings=30, dtype=torch.float64)
    items = [two_options("parametric"), {**two_options("parametric"), "context": "a" * 40}]
    result = run(lens, write(tmp_path, items))
    assert rows(result, "accuracy")[0]["coverage"] == 0.5
    assert any("has learned positions for 30" in warning for warning in result.warnings)


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_silenced_heads_lose_contextual_answers_only(planted: Any, silence: None, tmp_path: Path) -> None:
    """Contextual answers need attention, parametric ones do not; with equal logits no option is chosen."""
    result = run(planted, write(tmp_path, PLANTED), conditions="silence")
    accuracy = {(row["of"], row["kind"]): row for row in rows(result, "accuracy")}
    assert [accuracy["baseline", kind]["accuracy"] for kind in ("contextual", "parametric", "all")] == [
        1.0
    ] * 3
    assert accuracy["silence", "contextual"]["accuracy"] == 0.0
    assert accuracy["silence", "parametric"]["accuracy"] == 1.0
    assert accuracy["baseline", "contextual"]["chance"] == pytest.approx(1 / 3)
    assert any("equally probable in 3 items, which count as wrong" in warning for warning in result.warnings)
    lost = {row["kind"]: row for row in rows(result, "degradation")}
    assert lost["contextual"]["lost_accuracy"] == 1.0
    assert lost["parametric"]["lost_accuracy"] == 0.0
    assert lost["contextual − parametric"]["lost_accuracy"] == 1.0
    assert lost["contextual − parametric"]["log_odds_low"] > 0
    assert {row["item"]: row["chosen"] for row in rows(result, "items") if row["condition"] == "silence"} == {
        **{f"boat {colour}": None for colour in ("green", "red", "black")},
        **{f"sky {n}": "blue" for n in range(3)},
    }
    texts = rows(result, "texts")
    assert {row["text"] for row in texts} == {item["id"] for item in PLANTED}


@pytest.mark.slow
def test_batch_size_and_the_order_of_the_file_have_no_effect(
    tiny: Any, silence: None, tmp_path: Path
) -> None:
    items = [{"id": f"{index}", **item} for index, item in enumerate(LETTERS)]
    file, reversed_file = write(tmp_path, items), write(tmp_path, items[::-1], "turned.jsonl")
    values = {"conditions": "silence layer=1 seeds=1"}
    small_batches, one_batch = (run(tiny, file, {"batch_tokens": size}, **values) for size in (1, 100_000))
    require_same(
        small_batches.metrics["knowledge"].tables,
        one_batch.metrics["knowledge"].tables,
        "batches of one and of all",
    )
    reversed_result = run(tiny, reversed_file, **values)
    for table in ("accuracy", "degradation"):
        for expected, actual in zip(rows(one_batch, table), rows(reversed_result, table), strict=True):
            numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
            assert numbers == pytest.approx({name: actual[name] for name in numbers}, rel=1e-9), table


@pytest.mark.slow
def test_the_metric_keeps_the_contract_under_conditions_selected_on_the_runs_texts(tmp_path: Path) -> None:
    check_metric(
        Knowledge, {"file": write(tmp_path, LETTERS), "conditions": "bos-mlp seeds=1; qk-disruption seeds=1"}
    )


# --- files -----------------------------------------------------------------------------------------------------------

GOOD = '{"kind": "parametric", "prompt": "a", "options": ["b", "c"], "answer": 0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no question; put one on each line"),
        (b"\n  \n", "contains no question"),
        (b"{", "line 1: not valid JSON (Expecting property name enclosed in double quotes at character 2)"),
        (GOOD.encode() + b"\n[1]\n", "line 2: expected an object"),
        (GOOD.encode() + b"\n\n\xff\n", "line 3: not valid UTF-8 at byte 1; save the file as UTF-8"),
        (b'{"kind": "other"}', "line 1: `kind` is 'other'; expected contextual or parametric"),
        (b'{"kind": "parametric"}', "line 1: `options` is None; expected a list of two or more texts"),
        (
            GOOD.replace('"b", "c"', '"b"').encode(),
            "`options` is ['b']; expected a list of two or more texts",
        ),
        (GOOD.replace('"c"', "3").encode(), "option 3; expected a text that is not blank"),
        (GOOD.replace('"c"', '" b"').encode(), "two options are equal"),
        (GOOD.replace("0}", "2}").encode(), "`answer` is 2; expected the right option's index, 0 to 1"),
        (GOOD.replace("0}", "true}").encode(), "`answer` is True; expected"),
        (GOOD.replace("0}", '"b"}').encode(), "`answer` is 'b'; expected"),
        (GOOD.replace('"a"', '" "').encode(), "`prompt` is ' '; expected a text that is not blank"),
        (GOOD.replace('"a"', '"\\ud800"').encode(), "`prompt` has a lone surrogate at character 1"),
        (GOOD.replace("{", '{"context": 5, ').encode(), "`context` is 5; expected a text"),
        (GOOD.replace("{", '{"id": true, ').encode(), "`id` is True; expected text or a whole number"),
        (
            (GOOD.replace("{", '{"id": "x", ') + "\n").encode() * 2,
            "line 2: the id 'x' occurs on an earlier line; use unique ids",
        ),
        (b"[" * 100_000, "line 1: JSON nested too deeply"),
    ],
)
def test_an_unusable_line_is_reported_with_its_number(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        KnowledgeParams.parse({"file": str(path)})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; name a JSONL file of questions"):
        KnowledgeParams.parse({"file": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match="is not a regular file"):
        KnowledgeParams.parse({"file": str(tmp_path)})


def test_without_a_file_the_error_says_what_to_do_and_exits_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from phaselens.cli.entry import run_to_exit_code

    assert run_to_exit_code(["run", "-p", "knowledge"]) == 2
    message = capsys.readouterr().err
    assert "knowledge: no questions are included; name your JSONL file with -P knowledge.file=FILE" in message
    assert message.count("\n") == 1
    assert Knowledge.define(KnowledgeParams())


def test_ids_default_to_line_numbers_and_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    assert [item.id for item in read_questions(str(path)).questions] == ["1", "3"]
