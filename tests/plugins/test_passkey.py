"""Passkey retrieval: prompts of exact length, scores equal to greedy decoding, and planted truths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import BASELINE, CausalMetric, Condition, Params, Table, TaskPrompt, TextOutcome
from phaselens.testing import check_metric, tiny_lens, tiny_tokenizer
from phaselens.testing._checks import require_same
from phaselens_plugins._encoding import PromptEncoder
from phaselens_plugins._passkeys import (
    ANSWER,
    FILLER,
    NEEDLE,
    OPENING,
    QUESTION,
    count_matching_symbols,
    parse_lengths,
)
from phaselens_plugins._tasks import share_right
from phaselens_plugins.passkey import Passkey, PasskeyParams
from tests.plugins import ablations
from tests.plugins.task_models import installed_silence, repeater, word_tokenizer

TEXTS = ["the man went home", "it was late"]
LETTERS = {"symbols": "abcdefghij", "lengths": "260, 300", "depths": "0, 1", "n": 2}


def run(
    lens: Any, texts: Sequence[str] = TEXTS, options: Mapping[str, Any] | None = None, **values: Any
) -> Any:
    return ablations.run("passkey", lens, list(texts), params=values, **(options or {}))


def rows(result: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(result, "passkey", table)


@pytest.fixture(scope="module")
def planted() -> Any:
    return repeater()


@pytest.fixture(scope="module")
def pair_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files("phaselens.data") / "models" / "rope"))


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[None]:
    yield from installed_silence(tmp_path)


def prompts(tokenizer: Any, seed: int = 0, n_ctx: int | None = 512, **values: Any) -> Passkey:
    from tests.plugins.views import info

    metric = Passkey(info(n_ctx=n_ctx), PasskeyParams(**values), seed)
    metric.prompts(tokenizer)
    return metric


def pieces(tokenizer: Any) -> Any:
    """Return a byte-level BPE with tokens of up to three digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}| ?[^\s\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    numbers = [f"{n:03d}" for n in range(1000)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([*FILLER, OPENING, QUESTION, *numbers] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


def across_words(tokenizer: Any) -> Any:
    """Return a BPE in the manner of SentencePiece: spaces are ordinary symbols, and tokens may span words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>"], show_progress=False)
    bpe.train_from_iterator([*FILLER, OPENING, QUESTION, "!", "\n", *"0123456789"], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


TOKENIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bundled": (lambda tokenizer: tokenizer, "0123456789"),
    "characters": (lambda _: tiny_tokenizer(), "abcdefghij"),
    "words": (lambda _: word_tokenizer(), "0123456789"),
    "pieces": (pieces, "0123456789"),
    "across words": (across_words, "0123456789"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_have_exactly_the_given_length_and_the_tokens_of_their_text(
    name: str, pair_tokenizer: Any
) -> None:
    make_tokenizer, symbols = TOKENIZERS[name]
    tokenizer = make_tokenizer(pair_tokenizer)
    lengths = [300, 301, 302, 303, 431, 640]
    metric = prompts(
        tokenizer, lengths=", ".join(map(str, lengths)), depths="0, 0.3, 1", n=1, symbols=symbols
    )
    assert len(metric.made_prompts) == len(lengths) * 3 * 2
    assert not any("no filler has" in warning for warning in metric.warnings), metric.warnings
    encode = PromptEncoder(tokenizer)
    for prompt in metric.made_prompts.values():
        assert len(prompt.ids) == prompt.case.length
        question = encode(QUESTION)[len(encode.prefix_ids) :]
        ids_before_key = list(prompt.ids[: prompt.scored_from])
        if name != "words":  # unknown words cannot be decoded
            text = tokenizer.decode(prompt.ids[len(encode.prefix_ids) :])
            assert text.startswith(OPENING)
            assert text.endswith(QUESTION + ANSWER.format(key=prompt.key))
            assert encode(text) == list(prompt.ids)
            assert prompt.is_merged or tokenizer.decode(ids_before_key).rstrip().endswith(QUESTION)
            assert text.count(prompt.key) == (1 if prompt.case.null else 2)
        assert prompt.is_merged or ids_before_key[-len(question) + 1 :] == question[1:]
        assert "".join(map(encode.token_text, prompt.ids[prompt.scored_from :])).endswith(prompt.key)
    assert any(prompt.is_merged for prompt in metric.made_prompts.values()) == (name == "across words")


def test_max_tokens_does_not_cut_prompts(planted: Any) -> None:
    uncut = rows(run(planted, lengths="60", depths="0.5", n=1), "prompts")
    cut_texts = rows(run(planted, lengths="60", depths="0.5", n=1, options={"max_tokens": 5}), "prompts")
    assert uncut == cut_texts
    assert {row["n_tokens"] for row in cut_texts} == {60}


def test_depth_is_the_share_of_filler_before_the_key(pair_tokenizer: Any) -> None:
    metric = prompts(pair_tokenizer, lengths="512", depths="0, 0.25, 0.5, 0.75, 1", n=3)
    with_key = [prompt for prompt in metric.made_prompts.values() if not prompt.case.null]
    opening, question = (
        len(PromptEncoder(pair_tokenizer)(OPENING)),
        len(PromptEncoder(pair_tokenizer)(QUESTION)),
    )
    for prompt in with_key:
        assert prompt.key_at is not None
        first_position, last_position = opening + 4, len(prompt.ids) - question - 6 - 8
        depth = (prompt.key_at - first_position) / (last_position - first_position)
        assert abs(depth - prompt.case.depth) < 0.06, (prompt.case, depth)
        key = list(prompt.ids[prompt.scored_from :])
        assert prompt.is_copied
        assert list(prompt.ids[prompt.key_at : prompt.key_at + len(key)]) == key


def test_prompts_depend_on_the_seed_alone(pair_tokenizer: Any) -> None:
    values = {"lengths": "200, 300", "depths": "0.5, 1", "n": 2}
    expected = prompts(pair_tokenizer, **values).made_prompts
    assert expected == prompts(pair_tokenizer, **values).made_prompts
    fewer = prompts(pair_tokenizer, lengths="300", depths="0.5", n=1).made_prompts
    assert all(expected[name] == prompt for name, prompt in fewer.items())
    other_seed = prompts(pair_tokenizer, seed=1, **values).made_prompts
    assert {prompt.key for prompt in expected.values()}.isdisjoint(
        prompt.key for prompt in other_seed.values()
    )
    keys = [prompt.key for prompt in expected.values() if not prompt.case.null]
    assert len(set(keys)) == len(keys)


def test_a_twin_has_its_prompts_key_as_target_but_not_in_its_text(pair_tokenizer: Any) -> None:
    for null in ("removed", "other"):
        made_prompts = prompts(pair_tokenizer, lengths="200", n=2, null=null).made_prompts
        for prompt in made_prompts.values():
            if prompt.case.null:
                twin = made_prompts[prompt.case.id.removesuffix("/null")]
                assert prompt.key == twin.key
                assert prompt.ids[prompt.scored_from :] == twin.ids[twin.scored_from :]
                assert prompt.key_at is None
                text = pair_tokenizer.decode(prompt.ids[: prompt.scored_from])
                assert prompt.key not in text
                assert any(sign.isdigit() for sign in text) == (null == "other")
    assert all(
        not prompt.case.null
        for prompt in prompts(pair_tokenizer, lengths="200", null="none").made_prompts.values()
    )


def test_bos_follows_the_runs_policy() -> None:
    for bos, front in (("auto", [0]), ("always", [0]), ("never", [])):
        encode = PromptEncoder(tiny_tokenizer(), bos=bos, bos_token_id=0)
        assert encode.prefix_ids == front
        assert encode("ab")[: len(front)] == front
    with pytest.raises(InputError, match="no BOS token"):
        PromptEncoder(tiny_tokenizer(has_bos=False), bos="always")
    assert PromptEncoder(tiny_tokenizer(adds_bos=False)).prefix_ids == []


def test_a_special_token_after_a_text_is_left_out() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("ab")["input_ids"][-1] == 1
    assert PromptEncoder(tokenizer)("ab") == tiny_tokenizer()("ab")["input_ids"]


# --- greedy decoding -------------------------------------------------------------------------------------------------


def greedy(lens: Any, ids: Sequence[int], n: int, *, cache: bool) -> list[int]:
    tokens = torch.tensor([list(ids)])
    output = lens.original_model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n, min_new_tokens=n,
        use_cache=cache, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("digits", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_exact_is_greedy_decoding_with_and_without_a_cache(planted: Any, digits: int) -> None:
    records = rows(run(planted, lengths="60", n=6, digits=digits, depths="0, 1"), "prompts")
    made_prompts = prompts(
        planted.text_tokenizer, n_ctx=128, lengths="60", n=6, digits=digits, depths="0, 1"
    ).made_prompts
    for row, cache in itertools.product(records, (True, False)):
        prompt = made_prompts[row["prompt"]]
        decoded = greedy(
            planted, prompt.ids[: prompt.scored_from], len(prompt.ids) - prompt.scored_from, cache=cache
        )
        assert row["exact"] == (decoded == list(prompt.ids[prompt.scored_from :])), (prompt.case, decoded)
    if digits < 3:
        assert {row["exact"] for row in records} == {0, 1}


class TopEqualsTarget(CausalMetric[Params]):
    """A metric on fixed prompts that records whether every top token is its target."""

    name, version = "top-equals-target", "1"
    fixed_prompts: Sequence[TaskPrompt] = ()
    exact_by_prompt: Mapping[str, bool] = {}

    def setup(self) -> None:
        self.exact: dict[str, bool] = {}

    def conditions(self) -> list[Condition]:
        return []

    def prompts(self, tokenizer: Any) -> Sequence[TaskPrompt]:
        return self.fixed_prompts

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        super().record(condition, outcome)
        self.exact[outcome.text] = outcome.top.tolist() == outcome.targets.tolist()

    def compute(self) -> Mapping[str, Table]:
        type(self).exact_by_prompt = self.exact
        return super().compute()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-drope-nope", "mistral", "gpt2")),
    ],
)
def test_every_top_is_its_target_if_and_only_if_greedy_decoding_gives_the_targets(family: str) -> None:
    lens = tiny_lens(family, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    task_prompts, expected = [], {}
    for number in range(6):
        ids = torch.randint(0, 67, (9 + number,), generator=draw).tolist()
        decoded = greedy(lens, ids, 5, cache=True)
        assert decoded == greedy(lens, ids, 5, cache=False)
        for changed_index in (None, 0, 2, 4):
            key = [(token + (index == changed_index)) % 67 for index, token in enumerate(decoded)]
            name = f"{number}/{changed_index}"
            task_prompts.append(TaskPrompt(name, [*ids, *key], len(ids)))
            expected[name] = changed_index is None
    metric_class = type("Mine", (TopEqualsTarget,), {"fixed_prompts": task_prompts, "__module__": __name__})
    result = phaselens.run(lens, metrics=[metric_class], texts=TEXTS)
    assert not result.metrics["top-equals-target"].failures
    assert metric_class.exact_by_prompt == expected


@pytest.mark.slow
def test_log_probabilities_equal_those_of_a_whole_forward() -> None:
    lens = tiny_lens("llama", dtype=torch.float64, max_position_embeddings=512)
    records = {row["prompt"]: row for row in rows(run(lens, **LETTERS), "prompts")}
    made_prompts = prompts(lens.text_tokenizer, **LETTERS).made_prompts
    assert records.keys() == made_prompts.keys()
    for name, prompt in made_prompts.items():
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            logits = lens.original_model(ids).logits[0].log_softmax(-1)
        positions = range(prompt.scored_from, len(prompt.ids))
        naive = sum(float(logits[position - 1, prompt.ids[position]]) for position in positions)
        assert records[name]["log_p"] == pytest.approx(naive, abs=1e-6)
        top = [int(logits[position - 1].argmax()) for position in positions]
        assert records[name]["exact"] == (top == list(prompt.ids[prompt.scored_from :]))


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_a_network_that_repeats_the_only_digit_is_always_right(planted: Any) -> None:
    result = run(planted, lengths="60, 200", digits=1, n=3)
    for row in rows(result, "accuracy"):
        assert (row["exact"], row["digits"], row["coverage"]) == (1.0, 1.0, 1.0)
        assert row["ci_low"] < 1.0
        assert row["chance"] == pytest.approx(0.1)
        assert row["n"] == row["n_null"] == 15
        assert row["gain_low"] > 0
    summary = rows(result, "summary")[0]
    assert (summary["exact_within"], summary["exact_beyond"], summary["copied"]) == (1.0, 1.0, 1.0)


def test_the_network_predicts_another_key_if_the_text_has_that_one(planted: Any) -> None:
    row = rows(run(planted, lengths="60", digits=1, n=6, null="other"), "accuracy")[0]
    assert (row["exact"], row["exact_null"], row["digits_null"]) == (1.0, 0.0, 0.0)


def test_the_network_predicts_the_first_of_two_digits_twice(planted: Any) -> None:
    """At the second digit, the first is the more frequent one: the prediction is right only if they are equal."""
    values = {"lengths": "60", "digits": 2, "n": 30, "depths": "0.5"}
    made_prompts = prompts(planted.text_tokenizer, n_ctx=128, **values).made_prompts
    records = {row["prompt"]: row for row in rows(run(planted, **values), "prompts")}
    with_equal_digits = [
        name
        for name, prompt in made_prompts.items()
        if prompt.key[0] == prompt.key[1] and not prompt.case.null
    ]
    assert with_equal_digits
    for name, prompt in made_prompts.items():
        if not prompt.case.null:
            assert records[name]["exact"] == (name in with_equal_digits)


def test_silenced_heads_leave_the_network_at_chance(planted: Any, silence: None) -> None:
    result = run(planted, lengths="60", digits=1, n=10, conditions="silence")
    by_condition = {row["condition"]: row for row in rows(result, "accuracy")}
    assert list(by_condition) == ["baseline, 60 tokens", "silence, 60 tokens"]
    silenced = by_condition["silence, 60 tokens"]
    assert silenced["exact"] == 0.0  # all logits are equal, and the lowest id is not a digit
    assert silenced["change"] == -1.0
    assert silenced["change_low"] is None  # every prompt changed by the same amount
    assert silenced["gain"] == pytest.approx(0.0, abs=1e-12)
    conditions = {row["condition"]: row for row in rows(result, "conditions")}
    assert conditions["silence"]["ratio"] > 1
    assert conditions["baseline"]["n_texts"] == 50


# --- conditions of other metrics -------------------------------------------------------------------------------------


def test_conditions_come_from_any_installed_causal_metric_with_its_parameters(
    planted: Any, silence: None
) -> None:
    requested = "silence; silence layer=0 seeds=2"
    result = run(planted, lengths="60", digits=1, n=8, depths="0.5", conditions=requested)
    names = list(dict.fromkeys(row["of"] for row in rows(result, "accuracy")))
    label = "silence layer=0 seeds=2"
    assert names == ["baseline", "silence", f"{label}: silence", f"{label}: at random"]
    silenced = [row for row in rows(result, "accuracy") if row["of"].endswith("silence")]
    assert silenced[0]["probability"] == silenced[1]["probability"]
    contrast = rows(result, "contrasts")[0]
    assert (contrast["condition"], contrast["control"]) == (f"{label}: silence", f"{label}: at random")
    assert any("silence: saw 2 texts" in warning for warning in result.warnings)


@pytest.mark.slow
def test_a_condition_has_the_layer_that_its_metric_selects_alone() -> None:
    """The layer is selected on the same texts, whatever the prompts are."""
    lens = tiny_lens("llama", dtype=torch.float64, num_hidden_layers=3, max_position_embeddings=512)
    outer, inner = ("bos-mlp", {"seeds": 0}), ("passkey", {**LETTERS, "conditions": "bos-mlp seeds=0"})
    result = phaselens.run(
        lens, metrics=[outer, inner], texts=[*TEXTS, "and so he wept", "to be or not to be"]
    )
    layers = {
        name: [
            row["layer"]
            for row in result.rows(name, "conditions").records()
            if row["condition"] != "baseline"
        ]
        for name in ("bos-mlp", "passkey")
    }
    assert layers["bos-mlp"] == layers["passkey"] != []


def test_each_metric_sees_only_the_points_that_it_hooks(planted: Any, silence: None) -> None:
    """`silence` refuses any other point."""
    result = run(planted, lengths="60", n=1, conditions="bos-v seeds=0; silence; qk-disruption seeds=1")
    names = [row["condition"] for row in rows(result, "conditions")]
    assert {name.split(":")[0] for name in names} >= {"baseline", "bos-v", "silence"}


def test_edits_by_content_see_prompts_and_repeats_are_averaged_in_each(planted: Any, silence: None) -> None:
    """Each prompt is silenced under one of two seeds, so its mean score is one half."""
    result = run(planted, lengths="60", digits=1, n=4, conditions="silence seeds=2")
    control = next(row for row in rows(result, "accuracy") if row["of"].endswith("at random"))
    assert (control["exact"], control["n_seeds"], control["n"]) == (0.5, 2, 20)
    control_rows = [row for row in rows(result, "prompts") if row["condition"].endswith("at random")]
    for _, group in itertools.groupby(
        sorted(control_rows, key=lambda row: row["prompt"]), lambda row: row["prompt"]
    ):
        assert [row["seed"] for row in sorted(group, key=lambda row: row["seed"])] == [0, 1]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("silenc", "no plugin 'silenc'; did you mean silence"),
        ("sinks", "'sinks' does not change the model; name a causal metric"),
        ("silence layr=1", "conditions: silence: no parameter 'layr'; did you mean layer"),
        ("silence layer=-1", "conditions: silence: layer is '-1'; give a whole number, 0 or more"),
        ("silence layer", "'layer' after 'silence': write PARAMETER=VALUE"),
        ("silence layer=0 layer=1", "layer of 'silence' is given twice; keep one"),
        ("silence; silence", "'silence' is given twice; keep one"),
        ("silence 'layer", "No closing quotation"),
    ],
)
def test_unusable_conditions_are_reported_in_one_line(silence: None, conditions: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        PasskeyParams.parse({"conditions": conditions})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_condition_at_a_missing_layer_fails_and_names_the_layer(planted: Any, silence: None) -> None:
    result = phaselens.run(
        planted, metrics=[("passkey", {"lengths": "60", "conditions": "silence layer=7"})], texts=TEXTS
    )
    failure = result.metrics["passkey"].failures[0]
    assert "blocks.7" in failure.message


# --- what cannot be scored -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learned_positions_beyond_n_ctx_are_missing_with_the_reason() -> None:
    lens = tiny_lens("gpt2", max_position_embeddings=280, dtype=torch.float64)
    result = run(lens, **LETTERS)
    short, long = rows(result, "accuracy")
    assert (short["length"], short["coverage"], short["exact"]) == (260, 1.0, 0.0)
    assert (long["length"], long["coverage"], long["exact"], long["ci_low"]) == (300, 0.0, None, None)
    assert any(
        "300 tokens are missing: the model has learned positions for 280" in warning
        for warning in result.warnings
    )
    summary = rows(result, "summary")[0]
    assert (summary["coverage"], summary["exact_beyond"]) == (0.5, None)


def test_a_twin_without_its_prompt_is_not_run() -> None:
    """A twin without the key's sentence may fit into a length that is too short for its prompt."""
    lens = tiny_lens("llama")
    for length in (112, 120, 128, 136):
        result = phaselens.run(
            lens, metrics={"passkey": {"lengths": str(length), "symbols": "ab"}}, texts=TEXTS
        )
        for failure in result.metrics["passkey"].failures:
            assert "no prompt of these lengths can be made" in failure.message


def test_lengths_that_are_too_short_or_too_long_are_missing_with_the_reason(planted: Any) -> None:
    result = run(planted, lengths="20, 60, 90", n=1, longest=80)
    assert [row["coverage"] for row in rows(result, "accuracy")] == [0.0, 1.0, 0.0]
    assert any("20 tokens are missing: shorter than the question" in warning for warning in result.warnings)
    assert any(
        "90 tokens are missing: more than -P passkey.longest=80" in warning for warning in result.warnings
    )
    failed_result = phaselens.run(planted, metrics=[("passkey", {"lengths": "20"})], texts=TEXTS)
    assert "no prompt of these lengths can be made" in failed_result.metrics["passkey"].failures[0].message


def test_prompts_without_a_score_stay_in_the_denominator() -> None:
    """Accuracy over the scored prompts alone would be 1 here."""
    metric = prompts(word_tokenizer(), n_ctx=128, lengths="60", depths="0.5", n=4, digits=1, null="none")
    for index, (name, prompt) in enumerate(metric.made_prompts.items()):
        targets = np.array(prompt.ids[prompt.scored_from :])
        loss = np.full(len(targets), np.nan if index else 0.5)
        metric.record(BASELINE, TextOutcome(name, index, name, len(prompt.ids), loss, targets, targets))
    row = metric.compute()["cells"].records()[0]
    assert (row["n"], row["coverage"], row["exact"]) == (4, 0.25, 0.25)
    assert row["ci_high"] < 1.0
    assert any("NaN or infinite; not scored" in warning for warning in metric.warnings)


def test_a_key_within_a_longer_token_is_not_a_key() -> None:
    words = {1: "12", 2: "123", 3: "x12", 4: "3", 5: ""}
    token_name = words.__getitem__
    assert count_matching_symbols([2], [1], "0123456789", token_name) == (2, 2)
    assert count_matching_symbols([3], [1], "0123456789", token_name) == (0, 2)
    assert count_matching_symbols([5, 4], [1, 4], "0123456789", token_name) == (1, 3)
    metric = prompts(word_tokenizer(), n_ctx=128, lengths="60", depths="0.5", n=1, digits=2, null="none")
    name, prompt = next(iter(metric.made_prompts.items()))
    targets = np.array(prompt.ids[prompt.scored_from :])
    shifted = np.array([2, targets[0]])  # the digits occur in the predicted tokens, in the wrong place
    metric.record(BASELINE, TextOutcome(name, 0, name, 60, np.ones(2), shifted, targets))
    row = metric.compute()["prompts"].records()[0]
    assert row["exact"] == 0


def test_symbols_with_equal_tokens_are_refused() -> None:
    with pytest.raises(InputError, match=r"gives '0' and '1' the same tokens.*passkey\.symbols"):
        prompts(tiny_tokenizer(), lengths="260")


def test_keys_that_merge_with_the_question_are_scored_from_the_first_differing_token() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = [
        "<s>",
        *sorted({*"".join((*FILLER, OPENING, QUESTION, NEEDLE, "!0123456789\n"))}),
        "s ",
        "s 7",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={sign: index for index, sign in enumerate(vocabulary)},
            merges=[("s", " "), ("s ", "7")],
            unk_token="<s>",
        )
    )
    metric = prompts(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"),
        lengths="300",
        depths="0.5",
        n=20,
        digits=2,
    )
    n_merged = 0
    for prompt in metric.made_prompts.values():
        key_tokens = [vocabulary[token] for token in prompt.ids[prompt.scored_from :]]
        assert key_tokens == (["s 7", prompt.key[1]] if prompt.key[0] == "7" else ["s ", *prompt.key])
        n_merged += 1
    assert n_merged == 40
    assert any(
        "joins the answer with the question's last tokens in 40 of 40 prompts" in warning
        for warning in metric.warnings
    )


@pytest.mark.parametrize("n", [5, 10, 20])
def test_few_prompts_leave_wide_intervals(n: int) -> None:
    value, low, high = share_right([1.0] * (n // 2), n)
    assert value == pytest.approx(0.5, abs=0.11)
    assert low is not None
    assert high is not None
    assert 0.2 < (high - low) / 2 < 0.4 or n == 20
    assert share_right([], n) == (None, None, None)
    inside = share_right([0.5] * n, n)
    assert inside[1] is not None
    assert inside[1] <= low


# --- invariance, parameters, contract --------------------------------------------------------------------------------


@pytest.mark.slow
def test_batch_size_has_no_effect(silence: None) -> None:
    lens = tiny_lens("llama", dtype=torch.float64, max_position_embeddings=512)
    values = {**LETTERS, "conditions": "silence seeds=1"}
    small_batches, one_batch = (run(lens, options={"batch_tokens": size}, **values) for size in (1, 100_000))
    require_same(
        small_batches.metrics["passkey"].tables,
        one_batch.metrics["passkey"].tables,
        "batches of one and of all",
    )
    assert small_batches.warnings == one_batch.warnings


def test_merging_halves_equals_the_whole(planted: Any) -> None:
    unsplit = prompts(word_tokenizer(), n_ctx=128, lengths="60", n=2, digits=1)
    halves = [prompts(word_tokenizer(), n_ctx=128, lengths="60", n=2, digits=1) for _ in range(2)]
    for index, (name, prompt) in enumerate(unsplit.made_prompts.items()):
        targets = np.array(prompt.ids[prompt.scored_from :])
        outcome = TextOutcome(name, index, name, 60, np.array([0.1 * index]), targets - index % 2, targets)
        unsplit.record(BASELINE, outcome)
        halves[index % 2].record(BASELINE, replace(outcome))
    halves[0].merge(halves[1])
    expected = {name: table.rows for name, table in unsplit.compute().items()}
    assert {name: table.rows for name, table in halves[0].compute().items()} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": "some"}, "lengths: 'some'; write numbers of tokens, n_ctx, 2*n_ctx or n_ctx/4"),
        ({"lengths": " , "}, "give at least one"),
        ({"lengths": "0"}, "'0' is not a length"),
        ({"depths": "0, 2"}, "depths: '2'; write numbers from 0"),
        ({"depths": "deep"}, "depths: 'deep'"),
        ({"symbols": "11"}, "two or more different characters"),
        ({"symbols": "1 2"}, "no white space"),
        ({"n": "0"}, "n is '0'; give a whole number, 1 or more"),
        ({"null": "maybe"}, "null is 'maybe'; give removed or other or none"),
    ],
)
def test_bad_parameters_are_reported_in_one_line(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        PasskeyParams.parse(values)
    assert message in str(caught.value)


def test_lengths_are_numbers_or_multiples_of_n_ctx() -> None:
    assert parse_lengths("n_ctx/4, n_ctx/2, n_ctx, 2*n_ctx, 100, 1.5 * n_ctx / 2", 512) == [
        128,
        256,
        512,
        1024,
        100,
        384,
    ]
    assert parse_lengths("512, n_ctx", 512) == [512]
    with pytest.raises(InputError, match="does not state its context length"):
        parse_lengths("n_ctx", None)


def test_default_lengths_exceed_the_context_length(planted: Any) -> None:
    metric = Passkey(planted.info, PasskeyParams())
    assert metric.lengths == [32, 64, 128, 256]
    assert metric.depths == [0.0, 0.25, 0.5, 0.75, 1.0]


CONTRACT = {"symbols": "abcdef", "lengths": "260", "depths": "0.5", "n": 2}


@pytest.mark.slow
def test_the_metric_keeps_the_contract_under_conditions_selected_on_the_runs_texts() -> None:
    check_metric(Passkey, {**CONTRACT, "n": 1, "conditions": "bos-mlp seeds=1; qk-disruption seeds=1"})
