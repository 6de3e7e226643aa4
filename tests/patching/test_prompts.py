"""Prompts and their alignment."""

from __future__ import annotations

import pytest

import phaselens
import phaselens.patching as patching
from phaselens.errors import InputError
from phaselens.patching import Experiment, align, logit_diff, prompt
from phaselens.testing import tiny_lens, tiny_model, tiny_tokenizer
from tests.patching.conftest import lens_of


def test_two_prompts_of_one_length_are_aligned():
    lens = lens_of("llama")
    alignment = align(prompt(lens, "to be"), prompt(lens, "to do"))
    assert alignment.differing == (4, 5)
    assert str(alignment).splitlines()[0] == " pos  clean  corrupt"
    assert str(alignment).splitlines()[5] == "   4  'b'    ≠ 'd'"


@pytest.mark.parametrize(
    ("clean", "corrupt", "message"),
    [
        ("to be or", "to b or", "at position 5, where clean reads 'e' and corrupt has nothing"),
        ("to be", "to be or", "at position 6, where clean has nothing and corrupt reads ' ' 'o' 'r'"),
        ("aaa", "aa", "at position 3, where clean reads 'a' and corrupt has nothing"),
        ("to be", "to see", "at position 4, where clean reads 'b' and corrupt reads 's' 'e'"),
        ("x" * 20, "y", "clean reads 'x' 'x' 'x' 'x' 'x' 'x' … and corrupt reads 'y'"),
    ],
)
def test_an_error_names_the_position_where_prompts_of_two_lengths_diverge(clean, corrupt, message):
    lens = lens_of("llama")
    with pytest.raises(InputError) as error:
        align(prompt(lens, clean), prompt(lens, corrupt))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_of_two_models_cannot_be_aligned():
    llama, llama_gqa = lens_of("llama"), lens_of("llama-gqa")
    with pytest.raises(InputError, match="clean is a prompt of 'llama' and corrupt of 'llama-gqa'"):
        align(prompt(llama, "to"), prompt(llama_gqa, "to"))


def test_control_characters_of_a_text_are_escaped():
    lens = lens_of("llama")
    with_newline = prompt(lens, "a\nb")
    assert with_newline.words[2] == r"'\n'"
    assert all(word.isprintable() for word in with_newline.words)
    assert str(with_newline).count("\n") == 0


def test_a_prompt_starts_by_its_bos_policy():
    lens = lens_of("llama")
    assert prompt(lens, "a").ids[0] == 0
    assert prompt(lens, "a", bos="never").ids[0] != 0
    with pytest.raises(InputError, match="has no tokens"):
        prompt(lens, "", bos="never")
    with pytest.raises(InputError, match="did you mean never"):
        prompt(lens, "a", bos="neve")
    with pytest.raises(InputError, match="expected a prompt as text, received 3"):
        prompt(lens, 3)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_learned_positions_is_refused():
    with pytest.raises(InputError, match="129 tokens, but gpt2 has learned positions for 128"):
        prompt(lens_of("gpt2"), "a" * 128)
    assert len(prompt(lens_of("llama"), "a" * 200)) == 201


def test_a_model_without_a_tokenizer_has_no_prompts():
    lens = tiny_lens("llama")
    lens.text_tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer for prompts"):
        prompt(lens, "a")


def test_the_public_names_exist_and_are_documented():
    assert sorted(patching.__all__) == sorted(set(patching.__all__))
    for name in patching.__all__:
        assert getattr(patching, name).__doc__, name


def test_the_notes_of_a_prompt_say_what_its_ids_leave_out():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(adds_eos=True), check=False)
    marked, unmarked = prompt(lens, "<s>to"), prompt(lens_of("llama"), "to")
    assert marked.ids == unmarked.ids
    appended = (
        "the tokenizer appends '</s>' to a text; it is left out, because nothing continues a text after it"
    )
    begins_with_bos = "text 'prompt' itself begins with BOS '<s>'; no second one is added (bos: auto)"
    assert marked.notes == (appended, begins_with_bos)
    assert str(marked).splitlines()[1:] == [f"note: {appended}", f"note: {begins_with_bos}"]
    lines = str(align(marked, prompt(lens, "so"))).splitlines()
    assert lines[-3:] == [
        f"note: clean: {appended}",
        f"note: clean: {begins_with_bos}",
        f"note: corrupt: {appended}",
    ]
    assert unmarked.notes == ()


def test_a_prompt_follows_the_policy_of_its_model():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), bos="never", check=False)
    assert (prompt(lens, "a").ids, prompt(lens, "a").bos) == ((12,), "never")
    assert (prompt(lens, "a", bos="auto").ids, prompt(lens, "a", bos="auto").bos) == ((0, 12), "auto")


def test_results_are_measured_after_the_text_and_not_after_an_appended_eos():
    appends_eos, appends_nothing = (
        phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(adds_eos=adds_eos), check=False)
        for adds_eos in (True, False)
    )
    results = [
        Experiment(prompt(lens, "to be"), metric=logit_diff(lens, "a", "b")).run()
        for lens in (appends_eos, appends_nothing)
    ]
    assert str(results[0]) == str(results[1])


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [(None, "auto"), (("to do", None), "auto"), ((".to do", "never"), "clean auto, corrupt never")],
)
def test_every_result_names_the_bos_policy_of_its_prompts(corrupt, expected):
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


def test_the_bos_policy_of_a_result_is_that_of_the_model_by_default():
    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), bos="never", check=False)
    assert Experiment(prompt(lens, "to be")).run().bos == "never"
    assert Experiment(prompt(lens, "to be", bos="always")).measure("sinks").bos == "always"
