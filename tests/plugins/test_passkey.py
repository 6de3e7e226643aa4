"""Passkey retrieval: prompts of exact length, scores that are greedy decoding's, and truths that are known."""

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
from phaselens.plugin import BASELINE, CausalMetric, Outcome, Params, Prompt, plugins
from phaselens.testing import check_metric, tiny_lens, tiny_tokenizer
from phaselens.testing._checks import require_same
from phaselens_plugins import _passkeys
from phaselens_plugins._encoding import Encoder
from phaselens_plugins._passkeys import ANSWER, FILLER, NEEDLE, OPENING, QUESTION, agreement
from phaselens_plugins._tasks import share
from phaselens_plugins.passkey import Passkey, PasskeyParams
from tests.plugins import ablations
from tests.plugins.task_models import repeater, third_party, word_tokenizer

TEXTS = ["the man went home", "it was late"]
LETTERS = {"symbols": "abcdefghij", "lengths": "260, 300", "depths": "0, 1", "n": 2}


def run(
    lens: Any, texts: Sequence[str] = TEXTS, options: Mapping[str, Any] | None = None, **values: Any
) -> Any:
    return ablations.run("passkey", lens, list(texts), params=values, **(options or {}))


def rows(found: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(found, "passkey", table)


@pytest.fixture(scope="module")
def planted() -> Any:
    return repeater()


@pytest.fixture(scope="module")
def pair_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files("phaselens.data") / "models" / "rope"))


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[None]:
    plugins.cache_clear()
    plugins().add_file(str(third_party(tmp_path)))
    yield
    plugins.cache_clear()


def prompts(tokenizer: Any, seed: int = 0, n_ctx: int | None = 512, **values: Any) -> Passkey:
    from tests.plugins.views import info

    metric = Passkey(info(n_ctx=n_ctx), PasskeyParams(**values), seed)
    metric.prompts(tokenizer)
    return metric


def pieces(tokenizer: Any) -> Any:
    """A byte-level BPE that takes up to three digits at once."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}| ?[^\s\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    numbers = [f"{n:03d}" for n in range(1000)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*FILLER, OPENING, QUESTION, *numbers] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def across_words(tokenizer: Any) -> Any:
    """As SentencePiece does it: spaces are signs like any other, one is put in front, and tokens reach across words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>"], show_progress=False)
    inner.train_from_iterator([*FILLER, OPENING, QUESTION, "!", "\n", *"0123456789"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


TOKENIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bundled": (lambda given: given, "0123456789"),
    "characters": (lambda given: tiny_tokenizer(), "abcdefghij"),
    "words": (lambda given: word_tokenizer(), "0123456789"),
    "pieces": (pieces, "0123456789"),
    "across words": (across_words, "0123456789"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_have_exactly_the_length_asked_and_are_what_the_tokenizer_makes_of_their_text(
    name: str, pair_tokenizer: Any
) -> None:
    make, symbols = TOKENIZERS[name]
    tokenizer = make(pair_tokenizer)
    lengths = [300, 301, 302, 303, 431, 640]
    metric = prompts(
        tokenizer, lengths=", ".join(map(str, lengths)), depths="0, 0.3, 1", n=1, symbols=symbols
    )
    assert len(metric.hidden) == len(lengths) * 3 * 2
    assert not any("no filler gave" in warning for warning in metric.warnings), metric.warnings
    encode = Encoder(tokenizer)
    for made in metric.hidden.values():
        assert len(made.ids) == made.case.length
        question = encode(QUESTION)[len(encode.front) :]
        before = list(made.ids[: made.scored_from])
        if name != "words":  # unknown words say nothing
            text = tokenizer.decode(made.ids[len(encode.front) :])
            assert text.startswith(OPENING)
            assert text.endswith(QUESTION + ANSWER.format(key=made.key))
            assert encode(text) == list(made.ids)
            assert made.merged or tokenizer.decode(before).rstrip().endswith(QUESTION)
            assert text.count(made.key) == (1 if made.case.null else 2)
        assert made.merged or before[-len(question) + 1 :] == question[1:]
        assert "".join(map(encode.spell, made.ids[made.scored_from :])).endswith(made.key)
    assert any(made.merged for made in metric.hidden.values()) == (name == "across words")


def test_the_question_is_never_cut_whatever_the_run_cuts_its_texts_to(planted: Any) -> None:
    whole = rows(run(planted, lengths="60", depths="0.5", n=1), "prompts")
    cut = rows(run(planted, lengths="60", depths="0.5", n=1, options={"max_tokens": 5}), "prompts")
    assert whole == cut
    assert {row["n_tokens"] for row in cut} == {60}


def test_depth_says_how_much_of_the_filler_stands_before_the_key(pair_tokenizer: Any) -> None:
    metric = prompts(pair_tokenizer, lengths="512", depths="0, 0.25, 0.5, 0.75, 1", n=3)
    made = [one for one in metric.hidden.values() if not one.case.null]
    opening, question = len(Encoder(pair_tokenizer)(OPENING)), len(Encoder(pair_tokenizer)(QUESTION))
    for one in made:
        assert one.key_at is not None
        first, last = opening + 4, len(one.ids) - question - 6 - 8
        share = (one.key_at - first) / (last - first)
        assert abs(share - one.case.depth) < 0.06, (one.case, share)
        key = list(one.ids[one.scored_from :])
        assert one.copied
        assert list(one.ids[one.key_at : one.key_at + len(key)]) == key


def test_prompts_follow_the_seed_and_nothing_else(pair_tokenizer: Any) -> None:
    values = {"lengths": "200, 300", "depths": "0.5, 1", "n": 2}
    one = prompts(pair_tokenizer, **values).hidden
    assert one == prompts(pair_tokenizer, **values).hidden
    fewer = prompts(pair_tokenizer, lengths="300", depths="0.5", n=1).hidden
    assert all(one[name] == made for name, made in fewer.items())
    other = prompts(pair_tokenizer, seed=1, **values).hidden
    assert {made.key for made in one.values()}.isdisjoint(made.key for made in other.values())
    keys = [made.key for made in one.values() if not made.case.null]
    assert len(set(keys)) == len(keys)


def test_a_twin_has_the_key_of_its_prompt_as_target_and_not_in_its_text(pair_tokenizer: Any) -> None:
    for null in ("removed", "other"):
        hidden = prompts(pair_tokenizer, lengths="200", n=2, null=null).hidden
        for made in hidden.values():
            if made.case.null:
                twin = hidden[made.case.id.removesuffix("/null")]
                assert made.key == twin.key
                assert made.ids[made.scored_from :] == twin.ids[twin.scored_from :]
                assert made.key_at is None
                said = pair_tokenizer.decode(made.ids[: made.scored_from])
                assert made.key not in said
                assert any(sign.isdigit() for sign in said) == (null == "other")
    assert all(
        not made.case.null for made in prompts(pair_tokenizer, lengths="200", null="none").hidden.values()
    )


def test_bos_follows_the_runs_policy() -> None:
    for bos, front in (("auto", [0]), ("always", [0]), ("never", [])):
        encode = Encoder(tiny_tokenizer(), bos=bos, bos_token_id=0)
        assert encode.front == front
        assert encode("ab")[: len(front)] == front
    with pytest.raises(InputError, match="no BOS token"):
        Encoder(tiny_tokenizer(has_bos=False), bos="always")
    assert Encoder(tiny_tokenizer(adds_bos=False)).front == []


def test_a_special_token_behind_a_text_is_left_out() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("ab")["input_ids"][-1] == 1
    assert Encoder(tokenizer)("ab") == tiny_tokenizer()("ab")["input_ids"]


# --- greedy decoding -------------------------------------------------------------------------------------------------


def greedy(lens: Any, ids: Sequence[int], n: int, *, cache: bool) -> list[int]:
    tokens = torch.tensor([list(ids)])
    said = lens.original_model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n, min_new_tokens=n,
        use_cache=cache, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return said[0, len(ids) :].tolist()


@pytest.mark.parametrize("digits", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_exact_is_greedy_decoding_with_and_without_a_cache(planted: Any, digits: int) -> None:
    found = rows(run(planted, lengths="60", n=6, digits=digits, depths="0, 1"), "prompts")
    hidden = prompts(
        planted.text_tokenizer, n_ctx=128, lengths="60", n=6, digits=digits, depths="0, 1"
    ).hidden
    for row, cache in itertools.product(found, (True, False)):
        made = hidden[row["prompt"]]
        said = greedy(planted, made.ids[: made.scored_from], len(made.ids) - made.scored_from, cache=cache)
        assert row["exact"] == (said == list(made.ids[made.scored_from :])), (made.case, said)
    if digits < 3:
        assert {row["exact"] for row in found} == {0, 1}


class Continued(CausalMetric[Params]):
    """Prompts that end with what was given as their continuation."""

    name, version = "continued", "1"
    given: Sequence[Prompt] = ()

    def setup(self) -> None:
        self.exact: dict[str, bool] = {}

    def conditions(self) -> list[Any]:
        return []

    def prompts(self, tokenizer: Any) -> Sequence[Prompt]:
        return self.given

    def record(self, condition: Any, outcome: Outcome) -> None:
        super().record(condition, outcome)
        self.exact[outcome.text] = outcome.top.tolist() == outcome.targets.tolist()

    def compute(self) -> Any:
        type(self).found = self.exact
        return super().compute()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-drope-nope", "mistral", "gpt2")),
    ],
)
def test_every_top_is_its_target_if_and_only_if_greedy_decoding_says_so(family: str) -> None:
    lens = tiny_lens(family, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    given, expected = [], {}
    for number in range(6):
        ids = torch.randint(0, 67, (9 + number,), generator=draw).tolist()
        said = greedy(lens, ids, 5, cache=True)
        assert said == greedy(lens, ids, 5, cache=False)
        for changed in (None, 0, 2, 4):
            key = [(token + (place == changed)) % 67 for place, token in enumerate(said)]
            name = f"{number}/{changed}"
            given.append(Prompt(name, [*ids, *key], len(ids)))
            expected[name] = changed is None
    metric = type("Mine", (Continued,), {"given": given, "__module__": __name__})
    found = phaselens.run(lens, metrics=[metric], texts=TEXTS)
    assert not found.metrics["continued"].failures
    assert metric.found == expected


def test_log_probabilities_are_those_of_the_whole_logits() -> None:
    lens = tiny_lens("llama", dtype=torch.float64, max_position_embeddings=512)
    found = {row["prompt"]: row for row in rows(run(lens, **LETTERS), "prompts")}
    hidden = prompts(lens.text_tokenizer, **LETTERS).hidden
    assert found.keys() == hidden.keys()
    for name, made in hidden.items():
        ids = torch.tensor([made.ids])
        with torch.no_grad():
            logits = lens.original_model(ids).logits[0].log_softmax(-1)
        places = range(made.scored_from, len(made.ids))
        naive = sum(float(logits[place - 1, made.ids[place]]) for place in places)
        assert found[name]["log_p"] == pytest.approx(naive, abs=1e-6)
        top = [int(logits[place - 1].argmax()) for place in places]
        assert found[name]["exact"] == (top == list(made.ids[made.scored_from :]))


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_a_network_that_repeats_the_only_digit_is_always_right(planted: Any) -> None:
    found = run(planted, lengths="60, 200", digits=1, n=3)
    for row in rows(found, "accuracy"):
        assert (row["exact"], row["digits"], row["coverage"]) == (1.0, 1.0, 1.0)
        assert row["ci_low"] < 1.0
        assert row["chance"] == pytest.approx(0.1)
        assert row["n"] == row["n_null"] == 15
        assert row["gain_low"] > 0
    summary = rows(found, "summary")[0]
    assert (summary["exact_within"], summary["exact_beyond"], summary["copied"]) == (1.0, 1.0, 1.0)


def test_told_another_key_it_says_that_one(planted: Any) -> None:
    row = rows(run(planted, lengths="60", digits=1, n=6, null="other"), "accuracy")[0]
    assert (row["exact"], row["exact_null"], row["digits_null"]) == (1.0, 0.0, 0.0)


def test_of_two_digits_it_says_the_first_twice(planted: Any) -> None:
    """At the second digit, the first stands in the text once more than the second: right only if they are alike."""
    values = {"lengths": "60", "digits": 2, "n": 30, "depths": "0.5"}
    hidden = prompts(planted.text_tokenizer, n_ctx=128, **values).hidden
    found = {row["prompt"]: row for row in rows(run(planted, **values), "prompts")}
    twice = [name for name, made in hidden.items() if made.key[0] == made.key[1] and not made.case.null]
    assert twice
    for name, made in hidden.items():
        if not made.case.null:
            assert found[name]["exact"] == (name in twice)


def test_with_its_heads_silenced_it_is_at_chance(planted: Any, silence: None) -> None:
    found = run(planted, lengths="60", digits=1, n=10, conditions="silence")
    by_condition = {row["condition"]: row for row in rows(found, "accuracy")}
    assert list(by_condition) == ["baseline, 60 tokens", "silence, 60 tokens"]
    off = by_condition["silence, 60 tokens"]
    assert off["exact"] == 0.0  # all logits are equal, and the lowest id is no digit
    assert off["change"] == -1.0
    assert off["change_low"] is None  # every prompt changed alike
    assert off["gain"] == pytest.approx(0.0, abs=1e-12)
    conditions = {row["condition"]: row for row in rows(found, "conditions")}
    assert conditions["silence"]["ratio"] > 1
    assert conditions["baseline"]["n_texts"] == 50


# --- conditions of other metrics -------------------------------------------------------------------------------------


def test_conditions_come_from_any_installed_causal_metric_with_its_parameters(
    planted: Any, silence: None
) -> None:
    asked = "silence; silence layer=0 seeds=2"
    found = run(planted, lengths="60", digits=1, n=8, depths="0.5", conditions=asked)
    names = list(dict.fromkeys(row["of"] for row in rows(found, "accuracy")))
    long = "silence layer=0 seeds=2"
    assert names == ["baseline", "silence", f"{long}: silence", f"{long}: at random"]
    same = [row for row in rows(found, "accuracy") if row["of"].endswith("silence")]
    assert same[0]["probability"] == same[1]["probability"]
    contrast = rows(found, "contrasts")[0]
    assert (contrast["condition"], contrast["control"]) == (f"{long}: silence", f"{long}: at random")
    assert any("silence: saw 2 texts" in warning for warning in found.warnings)


def test_a_condition_is_where_its_metric_puts_it_by_itself() -> None:
    """Found on the same texts, whatever the prompts are."""
    lens = tiny_lens("llama", dtype=torch.float64, num_hidden_layers=3, max_position_embeddings=512)
    alone, inner = ("bos-mlp", {"seeds": 0}), ("passkey", {**LETTERS, "conditions": "bos-mlp seeds=0"})
    found = phaselens.run(
        lens, metrics=[alone, inner], texts=[*TEXTS, "and so he wept", "to be or not to be"]
    )
    layers = {
        name: [
            row["layer"] for row in found.rows(name, "conditions").records() if row["condition"] != "baseline"
        ]
        for name in ("bos-mlp", "passkey")
    }
    assert layers["bos-mlp"] == layers["passkey"] != []


def test_each_metric_sees_the_points_that_it_asked_for_and_no_other(planted: Any, silence: None) -> None:
    """`silence` refuses any other."""
    found = run(planted, lengths="60", n=1, conditions="bos-v seeds=0; silence; qk-disruption seeds=1")
    names = [row["condition"] for row in rows(found, "conditions")]
    assert {name.split(":")[0] for name in names} >= {"baseline", "bos-v", "silence"}


def test_edits_that_look_at_texts_see_prompts_and_repeats_are_averaged_in_each(
    planted: Any, silence: None
) -> None:
    """Each prompt is silenced under one of two seeds, so that on average it is right half of the time."""
    found = run(planted, lengths="60", digits=1, n=4, conditions="silence seeds=2")
    control = next(row for row in rows(found, "accuracy") if row["of"].endswith("at random"))
    assert (control["exact"], control["n_seeds"], control["n"]) == (0.5, 2, 20)
    shares = [row for row in rows(found, "prompts") if row["condition"].endswith("at random")]
    for _, group in itertools.groupby(
        sorted(shares, key=lambda row: row["prompt"]), lambda row: row["prompt"]
    ):
        assert [row["seed"] for row in sorted(group, key=lambda row: row["seed"])] == [0, 1]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("silenc", "no plugin 'silenc'; did you mean silence"),
        ("sinks", "'sinks' changes nothing in a model; name a causal metric"),
        ("silence layr=1", "conditions: silence: no parameter 'layr'; did you mean layer"),
        ("silence layer=-1", "conditions: silence: layer is '-1'; it takes a whole number, 0 or more"),
        ("silence layer", "'layer' after 'silence': write PARAMETER=VALUE"),
        ("silence layer=0 layer=1", "layer of 'silence' is given twice; keep one"),
        ("silence; silence", "'silence' stands there twice; keep one"),
        ("silence 'layer", "No closing quotation"),
    ],
)
def test_conditions_that_cannot_be_used_are_told_in_one_line(
    silence: None, asked: str, complaint: str
) -> None:
    with pytest.raises(InputError) as caught:
        PasskeyParams.parse({"conditions": asked})
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_condition_at_a_layer_that_is_not_there_fails_with_the_layer(planted: Any, silence: None) -> None:
    found = phaselens.run(
        planted, metrics=[("passkey", {"lengths": "60", "conditions": "silence layer=7"})], texts=TEXTS
    )
    failure = found.metrics["passkey"].failures[0]
    assert "blocks.7" in failure.message


# --- what cannot be scored -------------------------------------------------------------------------------------------


def test_learned_positions_beyond_n_ctx_are_null_with_the_reason() -> None:
    lens = tiny_lens("gpt2", max_position_embeddings=280, dtype=torch.float64)
    found = run(lens, **LETTERS)
    short, long = rows(found, "accuracy")
    assert (short["length"], short["coverage"], short["exact"]) == (260, 1.0, 0.0)
    assert (long["length"], long["coverage"], long["exact"], long["ci_low"]) == (300, 0.0, None, None)
    assert any(
        "300 tokens are null: the model has learned positions for 280" in one for one in found.warnings
    )
    summary = rows(found, "summary")[0]
    assert (summary["coverage"], summary["exact_beyond"]) == (0.5, None)


def test_a_twin_without_its_prompt_is_not_run() -> None:
    """Its question may be shorter than that of the prompt."""
    lens = tiny_lens("llama")
    for length in (112, 120, 128, 136):
        run_of = phaselens.run(
            lens, metrics={"passkey": {"lengths": str(length), "symbols": "ab"}}, texts=TEXTS
        )
        for failure in run_of.metrics["passkey"].failures:
            assert "no prompt of these lengths can be made" in failure.message


def test_lengths_that_are_too_short_or_too_long_are_null_with_the_reason(planted: Any) -> None:
    found = run(planted, lengths="20, 60, 90", n=1, longest=80)
    assert [row["coverage"] for row in rows(found, "accuracy")] == [0.0, 1.0, 0.0]
    assert any("20 tokens are null: shorter than the question" in one for one in found.warnings)
    assert any("90 tokens are null: more than -P passkey.longest=80" in one for one in found.warnings)
    failed = phaselens.run(planted, metrics=[("passkey", {"lengths": "20"})], texts=TEXTS)
    assert "no prompt of these lengths can be made" in failed.metrics["passkey"].failures[0].message


def test_what_could_not_be_scored_stays_in_the_denominator() -> None:
    """Accuracy over what was answered would be 1 here."""
    metric = prompts(word_tokenizer(), n_ctx=128, lengths="60", depths="0.5", n=4, digits=1, null="none")
    for index, (name, made) in enumerate(metric.hidden.items()):
        targets = np.array(made.ids[made.scored_from :])
        loss = np.full(len(targets), np.nan if index else 0.5)
        metric.record(BASELINE, Outcome(name, index, name, len(made.ids), loss, targets, targets))
    row = metric.compute()["cells"].records()[0]
    assert (row["n"], row["coverage"], row["exact"]) == (4, 0.25, 0.25)
    assert row["ci_high"] < 1.0
    assert any("NaN or infinite; not scored" in warning for warning in metric.warnings)


def test_a_key_inside_of_something_longer_is_no_key() -> None:
    words = {1: "12", 2: "123", 3: "x12", 4: "3", 5: ""}
    spell = words.__getitem__
    assert agreement([2], [1], "0123456789", spell) == (2, 2)
    assert agreement([3], [1], "0123456789", spell) == (0, 2)
    assert agreement([5, 4], [1, 4], "0123456789", spell) == (1, 3)
    metric = prompts(word_tokenizer(), n_ctx=128, lengths="60", depths="0.5", n=1, digits=2, null="none")
    name, made = next(iter(metric.hidden.items()))
    targets = np.array(made.ids[made.scored_from :])
    shifted = np.array([2, targets[0]])  # the digits occur in what is said, in the wrong place
    metric.record(BASELINE, Outcome(name, 0, name, 60, np.ones(2), shifted, targets))
    row = metric.compute()["prompts"].records()[0]
    assert row["exact"] == 0


def test_signs_that_the_tokenizer_does_not_tell_apart_are_refused() -> None:
    with pytest.raises(InputError, match=r"does not tell '0' from '1'.*passkey\.symbols"):
        prompts(tiny_tokenizer(), lengths="260")


def test_keys_that_merge_with_the_question_are_scored_from_where_tokens_differ() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    signs = ["<s>", *sorted({*"".join((*FILLER, OPENING, QUESTION, NEEDLE, "!0123456789\n"))}), "s ", "s 7"]
    inner = Tokenizer(
        models.BPE(
            vocab={sign: place for place, sign in enumerate(signs)},
            merges=[("s", " "), ("s ", "7")],
            unk_token="<s>",
        )
    )
    metric = prompts(
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>"),
        lengths="300",
        depths="0.5",
        n=20,
        digits=2,
    )
    reach_back = 0
    for made in metric.hidden.values():
        merged = [signs[token] for token in made.ids[made.scored_from :]]
        assert merged == (["s 7", made.key[1]] if made.key[0] == "7" else ["s ", *made.key])
        reach_back += 1
    assert reach_back == 40
    assert any(
        "begins inside of the question's last tokens in 40 of 40 prompts" in each for each in metric.warnings
    )


@pytest.mark.parametrize("n", [5, 10, 20])
def test_few_prompts_leave_wide_intervals(n: int) -> None:
    value, low, high = share([1.0] * (n // 2), n)
    assert value == pytest.approx(0.5, abs=0.11)
    assert low is not None
    assert high is not None
    assert 0.2 < (high - low) / 2 < 0.4 or n == 20
    assert share([], n) == (None, None, None)
    inside = share([0.5] * n, n)
    assert inside[1] is not None
    assert inside[1] <= low


# --- invariance, parameters, contract --------------------------------------------------------------------------------


@pytest.mark.slow
def test_batch_size_changes_nothing(silence: None) -> None:
    lens = tiny_lens("llama", dtype=torch.float64, max_position_embeddings=512)
    values = {**LETTERS, "conditions": "silence seeds=1"}
    one, other = (run(lens, options={"batch_tokens": size}, **values) for size in (1, 100_000))
    require_same(one.metrics["passkey"].tables, other.metrics["passkey"].tables, "batches of one and of all")
    assert one.warnings == other.warnings


def test_merging_halves_equals_the_whole(planted: Any) -> None:
    whole = prompts(word_tokenizer(), n_ctx=128, lengths="60", n=2, digits=1)
    halves = [prompts(word_tokenizer(), n_ctx=128, lengths="60", n=2, digits=1) for _ in range(2)]
    for index, (name, made) in enumerate(whole.hidden.items()):
        targets = np.array(made.ids[made.scored_from :])
        outcome = Outcome(name, index, name, 60, np.array([0.1 * index]), targets - index % 2, targets)
        whole.record(BASELINE, outcome)
        halves[index % 2].record(BASELINE, replace(outcome))
    halves[0].merge(halves[1])
    expected = {name: table.rows for name, table in whole.compute().items()}
    assert {name: table.rows for name, table in halves[0].compute().items()} == expected


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"lengths": "some"}, "lengths: 'some'; write numbers of tokens, n_ctx, 2*n_ctx or n_ctx/4"),
        ({"lengths": " , "}, "name at least one"),
        ({"lengths": "0"}, "'0' is no length"),
        ({"depths": "0, 2"}, "depths: '2'; write numbers from 0"),
        ({"depths": "deep"}, "depths: 'deep'"),
        ({"symbols": "11"}, "two or more different signs"),
        ({"symbols": "1 2"}, "none of them a space"),
        ({"n": "0"}, "n is '0'; it takes a whole number, 1 or more"),
        ({"null": "maybe"}, "null is 'maybe'; it takes removed or other or none"),
    ],
)
def test_bad_parameters_are_told_in_one_line(values: dict[str, str], complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        PasskeyParams.parse(values)
    assert complaint in str(caught.value)


def test_lengths_are_numbers_or_follow_from_the_model() -> None:
    assert _passkeys.lengths("n_ctx/4, n_ctx/2, n_ctx, 2*n_ctx, 100, 1.5 * n_ctx / 2", 512) == [
        128,
        256,
        512,
        1024,
        100,
        384,
    ]
    assert _passkeys.lengths("512, n_ctx", 512) == [512]
    with pytest.raises(InputError, match="does not say what length it was made for"):
        _passkeys.lengths("n_ctx", None)


def test_default_lengths_reach_beyond_the_models_own(planted: Any) -> None:
    metric = Passkey(planted.info, PasskeyParams())
    assert metric.lengths == [32, 64, 128, 256]
    assert metric.depths == [0.0, 0.25, 0.5, 0.75, 1.0]


CONTRACT = {"symbols": "abcdef", "lengths": "260", "depths": "0.5", "n": 2}


@pytest.mark.slow
def test_it_keeps_the_contract_under_conditions_that_are_found_on_the_runs_texts() -> None:
    check_metric(Passkey, {**CONTRACT, "n": 1, "conditions": "bos-mlp seeds=1; qk-disruption seeds=1"})
