"""Knowledge tasks: options scored by their probability, what a condition takes away, and files that cannot be used."""

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
from phaselens.plugin import BASELINE, Condition, Outcome, plugins
from phaselens.testing import check_metric, tiny_lens, tiny_tokenizer
from phaselens.testing._checks import require_same
from phaselens_plugins._encoding import Encoder, common
from phaselens_plugins._questions import Question, read_questions
from phaselens_plugins._scores import chance, difference, judge, same_answer
from phaselens_plugins.knowledge import Knowledge, KnowledgeParams
from tests.plugins import ablations
from tests.plugins.task_models import COLOURS, repeater, third_party, word_tokenizer
from tests.plugins.views import info

TEXTS = ["the man went home", "it was late"]

#: The planted network says `blue` after `sky`, and otherwise the colour that its text holds.
PLANTED: list[dict[str, Any]] = [
    {
        "id": f"boat {colour}",
        "kind": "contextual",
        "context": f"The boat is {colour}.",
        "prompt": "The colour of the boat is",
        "options": ["green", "red", "black"],
        "answer": place,
    }
    for place, colour in enumerate(("green", "red", "black"))
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


def rows(found: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(found, "knowledge", table)


@pytest.fixture(scope="module")
def planted() -> Any:
    return repeater()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_lens("llama", dtype=torch.float64)


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[None]:
    plugins.cache_clear()
    plugins().add_file(str(third_party(tmp_path)))
    yield
    plugins.cache_clear()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_an_options_log_probability_is_that_of_the_whole_logits(tiny: Any, tmp_path: Path) -> None:
    """The sum over the option's tokens, its white space included, from a forward of its own without any of our code."""
    found = rows(run(tiny, write(tmp_path, LETTERS)), "items")
    encode = tiny_tokenizer()
    for row, item in zip(found, LETTERS, strict=True):
        context = item.get("context")
        asked = (f"{context}\n\n" if context else "") + item["prompt"]
        question = asked.rstrip()
        gap = asked[len(question) :] or " "
        sums, means = [], []
        for option in item["options"]:
            start = len(encode(question)["input_ids"])
            ids = encode(question + gap + option)["input_ids"]
            with torch.no_grad():
                logits = tiny.original_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            each = [float(logits[place - 1, ids[place]]) for place in range(start, len(ids))]
            sums.append(sum(each))
            means.append(sum(each) / len(each))
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
    sums, lengths = [each[0] for each in scores], [each[1] for each in scores]
    answer = data.draw(st.integers(0, len(sums) - 1))
    found = judge(sums, lengths, answer)
    most = max(sums)
    weights = [math.exp(each - most) for each in sums]
    assert found.p == pytest.approx(weights[answer] / sum(weights), rel=1e-9, abs=1e-300)
    others = [judge(sums, lengths, other).p for other in range(len(sums))]
    assert sum(others) == pytest.approx(1.0)
    assert found.chosen is None or sums[found.chosen] == most


def test_options_that_begin_alike_are_told_apart_by_what_follows() -> None:
    """The first token alone would give them the same probability."""
    assert judge([-1.0 - 5.0, -1.0 - 0.1], [2, 2], 1).correct == 1.0
    encode = Encoder(tiny_tokenizer())
    first, second = (encode(f"is it {word}") for word in ("correct", "corrupt"))
    assert common(first, second) > len(encode("is it c")) - 1


def test_two_equal_options_are_no_answer() -> None:
    found = judge([-2.0, -2.0, -3.0], [1, 1, 1], 0)
    assert (found.chosen, found.correct) == (None, 0.0)


class Said:
    """Feeds a metric what a model would: log-probabilities of options by hand."""

    def __init__(self, file: str, tokenizer: Any) -> None:
        self.metric = Knowledge(info(n_ctx=None), KnowledgeParams.parse({"file": file}))
        self.given = self.metric.prompts(tokenizer)

    def says(self, condition: Condition, *sums: Sequence[float]) -> None:
        """A sum for each option of each item, spread over its tokens."""
        flat = [each for item in sums for each in item]
        for index, (prompt, total) in enumerate(zip(self.given, flat, strict=True)):
            targets = np.array(prompt.ids[prompt.scored_from :])
            loss = np.full(len(targets), -total / len(targets))
            self.metric.record(
                condition, Outcome(prompt.id, index, f"{index}", len(prompt.ids), loss, targets, targets)
            )

    def table(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.metric.compute()[name].records()
        return found


def two(kind: str, answer: int = 0, options: Sequence[str] = ("yes", "no")) -> dict[str, Any]:
    return {"kind": kind, "prompt": "is it so?", "options": list(options), "answer": answer}


def test_an_answer_that_contains_another_is_another_answer(tmp_path: Path) -> None:
    """Searching what was said for "correct" would find it in "incorrect", and "no" in "not" and "know"."""
    items = [two("parametric", 0, ("correct", "incorrect")), two("parametric", 0, ("no", "know", "not"))]
    said = Said(write(tmp_path, items), tiny_tokenizer())
    said.says(BASELINE, (-9.0, -1.0), (-9.0, -1.0, -8.0))
    assert [row["chosen"] for row in said.table("items")] == ["incorrect", "know"]
    assert said.table("accuracy")[0]["accuracy"] == 0.0
    assert any("one option begins with the whole of another" in each for each in said.metric.warnings)


def test_items_that_could_not_be_scored_stay_in_the_denominator(tmp_path: Path) -> None:
    """Over those that were answered, accuracy would be 1."""
    said = Said(write(tmp_path, [two("parametric")] * 4), tiny_tokenizer())
    nan = float("nan")
    said.says(BASELINE, (-1.0, -2.0), (nan, -2.0), (-1.0, nan), (nan, nan))
    row = said.table("accuracy")[0]
    assert (row["n"], row["coverage"], row["accuracy"]) == (4, 0.25, 0.25)
    assert sum("NaN or infinite for item" in each for each in said.metric.warnings) == 3


OFF = Condition("off", (), layer=0)


def conditions(said: Said, *given: Condition) -> None:
    said.metric.losses.conditions = {one.key: one for one in given}


def test_what_is_lost_is_paired_with_the_baseline_and_by_kind(tmp_path: Path) -> None:
    """Contextual items lose 2 nats each, parametric ones nothing; two answers of four are lost."""
    items = [*[two("contextual")] * 4, *[two("parametric")] * 4]
    said = Said(write(tmp_path, items), tiny_tokenizer())
    before = [(-1.0, -2.0 - n) for n in range(8)]
    after = [(first - (2.0 if n < 4 else 0.0), second) for n, (first, second) in enumerate(before)]
    conditions(said, OFF)
    said.says(BASELINE, *before)
    said.says(OFF, *after)
    found = {row["kind"]: row for row in said.table("degradation")}
    assert found["contextual"]["lost_log_odds"] == pytest.approx(2.0)
    assert found["contextual"]["log_odds_low"] == pytest.approx(2.0)
    assert found["contextual"]["lost_accuracy"] == 0.5  # 2 nats turn the first, and make a tie of the second
    assert found["parametric"]["lost_log_odds"] == found["parametric"]["lost_accuracy"] == 0.0
    assert found["parametric"]["accuracy_low"] is None  # no item changed
    apart = found["contextual − parametric"]
    assert apart["lost_log_odds"] == pytest.approx(2.0)
    assert (apart["n"], apart["lost_accuracy"]) == (4, found["contextual"]["lost_accuracy"])


def test_degradation_below_chance_is_flagged_and_gives_no_share(tmp_path: Path) -> None:
    """A model that turns all its answers around has lost more than all: 100 × (1 − 0)/1 would read as a measurement."""
    said = Said(write(tmp_path, [two("parametric")] * 20), tiny_tokenizer())
    conditions(said, OFF, half := Condition("half", ()))
    said.says(BASELINE, *[(-1.0, -2.0)] * 20)
    said.says(OFF, *[(-2.0, -1.0)] * 20)
    said.says(half, *[(-1.0, -2.0), (-1.0, -2.0), (-2.0, -1.0), (-1.0, -2.0)] * 5)
    found = {(row["condition"], row["kind"]): row for row in said.table("degradation")}
    assert found["off", "parametric"]["lost_accuracy"] == 1.0
    assert (found["off", "parametric"]["lost_of_all"], found["off", "parametric"]["status"]) == (
        None,
        "below chance",
    )
    assert (found["half", "parametric"]["lost_of_all"], found["half", "parametric"]["status"]) == (0.5, "ok")
    assert any("below chance" in each for each in said.metric.warnings)


def test_a_baseline_at_chance_has_nothing_to_lose(tmp_path: Path) -> None:
    """Half right of two options, and then one fewer: 100 × (base − after)/base would say 20 %."""
    said = Said(write(tmp_path, [two("parametric", n % 2) for n in range(10)]), tiny_tokenizer())
    conditions(said, OFF)
    said.says(BASELINE, *[(-1.0, -2.0)] * 10)
    said.says(OFF, (-2.0, -1.0), *[(-1.0, -2.0)] * 9)
    row = said.table("degradation")[0]
    assert (row["lost_of_all"], row["status"]) == (None, "baseline at chance")
    assert row["lost_accuracy"] == pytest.approx(0.1)
    accuracy = said.table("accuracy")[0]
    assert (accuracy["chance"], accuracy["same_answer"]) == (0.5, 0.5)


GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "tasks.json").read_text())["items"]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['model']} {row['task']}")
def test_published_degradations_of_what_was_not_above_chance_are_not_repeated(
    row: dict[str, Any], tmp_path: Path
) -> None:
    """Each is 100 (before − after) / before; 0.16 → 0.51 on two-way questions became −219 %."""
    n, before, after = row["n"], row["baseline"], row["disrupted"]
    assert row["degradation"] == pytest.approx(100 * (before - after) / before, abs=0.1)
    said = Said(write(tmp_path, [two(row["kind"])] * n), tiny_tokenizer())
    conditions(said, OFF)
    for condition, accuracy in ((BASELINE, before), (OFF, after)):
        right = round(n * accuracy)
        said.says(condition, *[(-1.0, -2.0)] * right, *[(-2.0, -1.0)] * (n - right))
    found = said.table("degradation")[0]
    assert found["lost_accuracy"] == pytest.approx(before - after)
    if before <= 0.5:
        assert (found["lost_of_all"], found["status"]) == (None, "baseline at chance")
    else:
        assert found["status"] == "ok"
        assert found["lost_of_all"] == pytest.approx((before - after) / (before - 0.5))


def test_repeats_of_a_control_are_averaged_item_by_item(tmp_path: Path) -> None:
    said = Said(write(tmp_path, [two("parametric")] * 4), tiny_tokenizer())
    repeats = [Condition("control", (), seed=seed) for seed in range(2)]
    conditions(said, *repeats)
    said.says(BASELINE, *[(-1.0, -2.0)] * 4)
    said.says(repeats[0], *[(-1.0, -2.0)] * 4)
    said.says(repeats[1], *[(-2.0, -1.0)] * 4)
    row = next(row for row in said.table("accuracy") if row["of"] == "control")
    assert (row["accuracy"], row["n"], row["n_seeds"], row["log_odds"]) == (0.5, 4, 2, pytest.approx(0.0))
    degradation = said.table("degradation")
    assert [row["n"] for row in degradation] == [4, 4]


def test_chance_is_the_mean_over_items_and_not_one_over_two() -> None:
    items = [Question(f"{n}", "parametric", "?", tuple(COLOURS[:n]), 0) for n in (2, 4, 4)]
    assert chance(items) == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    assert same_answer(items) == 1.0


def test_a_difference_of_kinds_has_an_interval_over_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(1.0, 1.0, 40).tolist(), generator.normal(0.0, 1.0, 60).tolist()
    centre, low, high = difference(first, second, seed=0)
    assert low is not None
    assert high is not None
    assert centre == pytest.approx(np.mean(first) - np.mean(second))
    sd = math.sqrt(np.var(first) / 40 + np.var(second) / 60)
    assert (high - low) / 2 == pytest.approx(1.96 * sd, rel=0.1)
    assert difference([1.0], second, seed=0)[1:] == (None, None)
    assert difference([], second, seed=0) == (None, None, None)


# --- white space and tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "asked", "continuation"),
    [
        ("Is it?", "Is it?", " Yes"),
        ("Is it? ", "Is it?", " Yes"),
        ("Is it?\n", "Is it?", "\nYes"),
        ("Is it? \n ", "Is it?", " \n Yes"),
    ],
)
def test_an_option_follows_after_the_prompts_own_white_space_or_one_space(
    prompt: str, asked: str, continuation: str
) -> None:
    item = Question("a", "parametric", prompt, ("Yes", "No"), 0)
    assert (item.asked, item.continuation(0)) == (asked, continuation)


def test_a_context_stands_before_the_prompt() -> None:
    item = Question("a", "contextual", "Is it?", ("Yes", "No"), 0, "It is. ")
    assert item.asked == "It is.\n\nIs it?"


def test_spaces_written_into_options_change_nothing(tmp_path: Path) -> None:
    plain = read_questions(write(tmp_path, [two("parametric")]))
    spaced = read_questions(write(tmp_path, [two("parametric", 0, (" yes", "no "))], "spaced.jsonl"))
    assert plain.items == spaced.items


def merging() -> Any:
    """A tokenizer that makes one token of `so? y` and of `so? n`, so that options reach back into the question."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    signs = ["<s>", *sorted(set("is it so? yesno")), "?_", "? ", "? y", "? n"]
    inner = Tokenizer(
        models.BPE(
            vocab={sign: place for place, sign in enumerate(signs)},
            merges=[("?", " "), ("? ", "y"), ("? ", "n")],
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def test_options_that_merge_with_the_question_are_all_scored_from_the_same_place(tmp_path: Path) -> None:
    said = Said(write(tmp_path, [two("parametric")]), merging())
    assert len({prompt.scored_from for prompt in said.given}) == 1
    question = "is it so"
    assert said.given[0].scored_from == len(merging()(question)["input_ids"])
    assert any(
        "options change the tokens at the end of the question; its last 1" in each
        for each in said.metric.warnings
    )


def test_options_that_the_tokenizer_does_not_tell_apart_count_as_not_right(tmp_path: Path) -> None:
    items = [two("parametric", 0, ("green", "red")), two("parametric", 0, ("cerise", "mauve"))]
    said = Said(write(tmp_path, items), word_tokenizer())
    assert any("gives two of its options the same tokens" in each for each in said.metric.warnings)
    said.says(BASELINE, (-1.0, -2.0))
    row = said.table("accuracy")[0]
    assert (row["n"], row["coverage"], row["accuracy"]) == (2, 0.5, 0.5)


def test_a_question_is_never_cut_whatever_the_run_cuts_its_texts_to(tiny: Any, tmp_path: Path) -> None:
    file = write(tmp_path, LETTERS)
    assert rows(run(tiny, file), "items") == rows(run(tiny, file, {"max_tokens": 4}), "items")


def test_questions_beyond_learned_positions_are_not_cut_but_not_scored(tmp_path: Path) -> None:
    lens = tiny_lens("gpt2", max_position_embeddings=30, dtype=torch.float64)
    items = [two("parametric"), {**two("parametric"), "context": "a" * 40}]
    found = run(lens, write(tmp_path, items))
    assert rows(found, "accuracy")[0]["coverage"] == 0.5
    assert any("has learned positions for 30" in each for each in found.warnings)


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_only_what_was_read_is_lost_when_heads_are_silenced(
    planted: Any, silence: None, tmp_path: Path
) -> None:
    """Contextual answers come through attention, parametric ones do not; with all logits equal nothing is chosen."""
    found = run(planted, write(tmp_path, PLANTED), conditions="silence")
    accuracy = {(row["of"], row["kind"]): row for row in rows(found, "accuracy")}
    assert [accuracy["baseline", kind]["accuracy"] for kind in ("contextual", "parametric", "all")] == [
        1.0
    ] * 3
    assert accuracy["silence", "contextual"]["accuracy"] == 0.0
    assert accuracy["silence", "parametric"]["accuracy"] == 1.0
    assert accuracy["baseline", "contextual"]["chance"] == pytest.approx(1 / 3)
    assert any("equally probable in 3 items, which count as wrong" in each for each in found.warnings)
    lost = {row["kind"]: row for row in rows(found, "degradation")}
    assert lost["contextual"]["lost_accuracy"] == 1.0
    assert lost["parametric"]["lost_accuracy"] == 0.0
    assert lost["contextual − parametric"]["lost_accuracy"] == 1.0
    assert lost["contextual − parametric"]["log_odds_low"] > 0
    assert {row["item"]: row["chosen"] for row in rows(found, "items") if row["condition"] == "silence"} == {
        **{f"boat {colour}": None for colour in ("green", "red", "black")},
        **{f"sky {n}": "blue" for n in range(3)},
    }
    texts = rows(found, "texts")
    assert {row["text"] for row in texts} == {item["id"] for item in PLANTED}


def test_batch_size_and_the_order_of_the_file_change_nothing(
    tiny: Any, silence: None, tmp_path: Path
) -> None:
    items = [{"id": f"{place}", **item} for place, item in enumerate(LETTERS)]
    file, turned = write(tmp_path, items), write(tmp_path, items[::-1], "turned.jsonl")
    values = {"conditions": "silence layer=1 seeds=1"}
    one, other = (run(tiny, file, {"batch_tokens": size}, **values) for size in (1, 100_000))
    require_same(
        one.metrics["knowledge"].tables, other.metrics["knowledge"].tables, "batches of one and of all"
    )
    reverse = run(tiny, turned, **values)
    for table in ("accuracy", "degradation"):
        for first, second in zip(rows(other, table), rows(reverse, table), strict=True):
            numbers = {name: value for name, value in first.items() if isinstance(value, float)}
            assert numbers == pytest.approx({name: second[name] for name in numbers}, rel=1e-9), table


@pytest.mark.slow
def test_it_keeps_the_contract_under_conditions_that_are_found_on_the_runs_texts(tmp_path: Path) -> None:
    check_metric(
        Knowledge, {"file": write(tmp_path, LETTERS), "conditions": "bos-mlp seeds=1; qk-disruption seeds=1"}
    )


# --- files -----------------------------------------------------------------------------------------------------------

GOOD = '{"kind": "parametric", "prompt": "a", "options": ["b", "c"], "answer": 0}'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no question; put one on each line"),
        (b"\n  \n", "holds no question"),
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
        (GOOD.replace('"c"', '" b"').encode(), "two options say the same"),
        (GOOD.replace("0}", "2}").encode(), "`answer` is 2; expected the right option's place, 0 to 1"),
        (GOOD.replace("0}", "true}").encode(), "`answer` is True; expected"),
        (GOOD.replace("0}", '"b"}').encode(), "`answer` is 'b'; expected"),
        (GOOD.replace('"a"', '" "').encode(), "`prompt` is ' '; expected a text that is not blank"),
        (GOOD.replace('"a"', '"\\ud800"').encode(), "`prompt` has a lone surrogate at symbol 1"),
        (GOOD.replace("{", '{"context": 5, ').encode(), "`context` is 5; expected a text"),
        (GOOD.replace("{", '{"id": true, ').encode(), "`id` is True; expected text or a whole number"),
        (
            (GOOD.replace("{", '{"id": "x", ') + "\n").encode() * 2,
            "line 2: the id 'x' stood there before; give each its own",
        ),
        (b"[" * 100_000, "line 1: JSON nested too deeply"),
    ],
)
def test_a_line_that_cannot_be_used_is_told_with_its_number(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        KnowledgeParams.parse({"file": str(path)})
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; name a JSONL file of questions"):
        KnowledgeParams.parse({"file": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match="is no regular file"):
        KnowledgeParams.parse({"file": str(tmp_path)})


def test_without_a_file_it_says_what_to_do_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    from phaselens.cli.outcome import run_to_exit_code

    assert run_to_exit_code(["run", "-p", "knowledge"]) == 2
    said = capsys.readouterr().err
    assert (
        "knowledge: it has no questions of its own; name a JSONL file of yours by -P knowledge.file=FILE"
        in said
    )
    assert said.count("\n") == 1
    assert Knowledge.define(KnowledgeParams())


def test_ids_are_line_numbers_where_none_are_given_and_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    assert [item.id for item in read_questions(str(path)).items] == ["1", "3"]
