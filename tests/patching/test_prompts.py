"""Prompts and their alignment."""

from __future__ import annotations

import pytest

import phaselens
import phaselens.patching as patching
from phaselens.errors import InputError
from phaselens.patching import Experiment, align, logit_diff, prompt
from phaselens.testing import tiny_lens, tiny_model, tiny_tokenizer
from tests.patching.conftest import lens_of


def test_two_prompts_of_a_length_stand_side_by_side():
    lens = lens_of("llama")
    found = align(prompt(lens, "to be"), prompt(lens, "to do"))
    assert found.differing == (4, 5)
    assert str(found).splitlines()[0] == " pos  clean  corrupt"
    assert str(found).splitlines()[5] == "   4  'b'    ≠ 'd'"


@pytest.mark.parametrize(
    ("clean", "corrupt", "where"),
    [
        ("to be or", "to b or", "at position 5, where clean reads 'e' and corrupt has nothing"),
        ("to be", "to be or", "at position 6, where clean has nothing and corrupt reads ' ' 'o' 'r'"),
        ("aaa", "aa", "at position 3, where clean reads 'a' and corrupt has nothing"),
        ("to be", "to see", "at position 4, where clean reads 'b' and corrupt reads 's' 'e'"),
        ("x" * 20, "y", "clean reads 'x' 'x' 'x' 'x' 'x' 'x' … and corrupt reads 'y'"),
    ],
)
def test_prompts_of_two_lengths_part_somewhere_and_it_is_said_where(clean, corrupt, where):
    lens = lens_of("llama")
    with pytest.raises(InputError) as error:
        align(prompt(lens, clean), prompt(lens, corrupt))
    assert where in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_of_two_models_do_not_go_together():
    one, other = lens_of("llama"), lens_of("llama-gqa")
    with pytest.raises(InputError, match="clean is a prompt of 'llama' and corrupt of 'llama-gqa'"):
        align(prompt(one, "to"), prompt(other, "to"))


def test_control_characters_of_a_text_are_spelled_out():
    lens = lens_of("llama")
    read = prompt(lens, "a\nb")
    assert read.words[2] == r"'\n'"
    assert all(word.isprintable() for word in read.words)
    assert str(read).count("\n") == 0


def test_a_prompt_begins_as_it_is_asked_to():
    lens = lens_of("llama")
    assert prompt(lens, "a").ids[0] == 0
    assert prompt(lens, "a", bos="never").ids[0] != 0
    with pytest.raises(InputError, match="has no tokens"):
        prompt(lens, "", bos="never")
    with pytest.raises(InputError, match="did you mean never"):
        prompt(lens, "a", bos="neve")
    with pytest.raises(InputError, match="a prompt is a text, got int"):
        prompt(lens, 3)  # type: ignore[arg-type]


def test_learned_positions_end_somewhere():
    with pytest.raises(InputError, match="129 tokens, but gpt2 has learned positions for 128"):
        prompt(lens_of("gpt2"), "a" * 128)
    assert len(prompt(lens_of("llama"), "a" * 200)) == 201


def test_a_model_without_a_tokenizer_reads_no_prompts():
    lens = tiny_lens("llama")
    lens.text_tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer for prompts"):
        prompt(lens, "a")


def test_the_public_names_are_there_and_documented():
    assert sorted(patching.__all__) == sorted(set(patching.__all__))
    for name in patching.__all__:
        assert getattr(patching, name).__doc__, name


def test_a_prompt_says_what_its_ids_leave_out():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(adds_eos=True), check=False)
    read, plain = prompt(lens, "<s>to"), prompt(lens_of("llama"), "to")
    assert read.ids == plain.ids
    appended = "the tokenizer appends '</s>' to a text; it is left out, as nothing continues a text after it"
    written = (
        "text 'prompt' begins with the BOS token '<s>' as written; BOS is there exactly once (bos: auto)"
    )
    assert read.notes == (appended, written)
    assert str(read).splitlines()[1:] == [f"note: {appended}", f"note: {written}"]
    shown = str(align(read, prompt(lens, "so"))).splitlines()
    assert shown[-3:] == [f"note: clean: {appended}", f"note: clean: {written}", f"note: corrupt: {appended}"]
    assert plain.notes == ()


def test_a_prompt_follows_the_policy_of_its_model():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), bos="never", check=False)
    assert (prompt(lens, "a").ids, prompt(lens, "a").bos) == ((12,), "never")
    assert (prompt(lens, "a", bos="auto").ids, prompt(lens, "a", bos="auto").bos) == ((0, 12), "auto")


def test_results_are_judged_after_the_text_and_not_after_an_appended_eos():
    ends, plain = (
        phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(adds_eos=adds_eos), check=False)
        for adds_eos in (True, False)
    )
    results = [
        Experiment(prompt(lens, "to be"), metric=logit_diff(lens, "a", "b")).run() for lens in (ends, plain)
    ]
    assert str(results[0]) == str(results[1])


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [(None, "auto"), (("to do", None), "auto"), ((".to do", "never"), "clean auto, corrupt never")],
)
def test_every_result_says_the_policy_of_its_prompts(corrupt, expected):
    lens = lens_of("llama")
    experiment = Experiment(
        prompt(lens, "to be"), None if corrupt is None else prompt(lens, corrupt[0], bos=corrupt[1])
    )
    results = [experiment.run(), experiment.measure("bos-norm")]
    if corrupt is not None:
        results += [experiment.sweep("mlp"), experiment.attribution("mlp")]
    for result in results:
        assert result.bos == expected
        assert str(result).splitlines()[-1] == f"bos: {expected}"


def test_the_policy_of_a_result_is_that_of_the_model():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), bos="never", check=False)
    assert Experiment(prompt(lens, "to be")).run().bos == "never"
    assert Experiment(prompt(lens, "to be", bos="always")).measure("sinks").bos == "always"
