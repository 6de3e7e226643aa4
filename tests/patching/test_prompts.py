"""Prompts and their alignment."""

from __future__ import annotations

import pytest

import phaselens.patching as patching
from phaselens.errors import InputError
from phaselens.patching import align, prompt
from phaselens.testing import tiny_lens
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
