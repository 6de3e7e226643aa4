"""Documents cut into windows: nothing is lost, nothing is read twice, and each window fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.toys import letters, toy_tokenizer

import phaselens
from phaselens.data import Encoder, Text, Windows
from phaselens.errors import InputError

DOCUMENT = Text("doc", letters(23), "prose")


@pytest.fixture(scope="module")
def bundled_tokenizer() -> Any:
    """The byte-level BPE of the bundled pair."""
    return phaselens.load("rope", check=False).text_tokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
def test_windows_fit_and_together_are_the_document(adds_bos: bool) -> None:
    encoder = Encoder(toy_tokenizer(adds_bos=adds_bos))
    windows = Windows(8).cut([DOCUMENT], encoder)
    assert [window.id for window in windows] == [f"doc#{n}" for n in range(len(windows))]
    assert "".join(window.text for window in windows) == DOCUMENT.text
    assert all(len(encoder(window.text)) <= 8 for window in windows)
    assert len(windows) == -(-23 // (7 if adds_bos else 8))
    assert {window.label for window in windows} == {"prose"}


def test_a_text_that_fits_keeps_its_id() -> None:
    encoder = Encoder(toy_tokenizer())
    short = Text("short", letters(7))
    assert Windows(8).cut([short, DOCUMENT], encoder)[0] == short


def test_a_stride_makes_windows_overlap_and_ends_with_the_document() -> None:
    encoder = Encoder(toy_tokenizer(adds_bos=False))
    windows = Windows(8, 3).cut([DOCUMENT], encoder)
    words = DOCUMENT.text.split()
    assert [window.text.split() for window in windows] == [
        words[start : start + 8] for start in range(0, 16, 3)
    ]
    assert windows[-1].text.split()[-1] == words[-1]


def test_a_stride_beyond_the_window_skips_text() -> None:
    encoder = Encoder(toy_tokenizer(adds_bos=False))
    windows = Windows(4, 10).cut([DOCUMENT], encoder)
    words = DOCUMENT.text.split()
    assert [window.text.split() for window in windows] == [words[0:4], words[10:14], words[20:23]]


@pytest.mark.slow
@given(text=st.text(min_size=1, max_size=60), size=st.integers(2, 20))
def test_no_character_but_space_is_lost_or_repeated(bundled_tokenizer: Any, text: str, size: int) -> None:
    encoder = Encoder(bundled_tokenizer)
    windows = Windows(size).cut([Text("t", text)], encoder)
    # A window of white space alone is left out, as blank lines are.
    assert "".join("".join(window.text for window in windows).split()) == "".join(text.split())
    assert all(window.text.strip() for window in windows) or len(windows) == 1


def test_a_character_of_several_tokens_gives_no_empty_window(bundled_tokenizer: Any) -> None:
    windows = Windows(2).cut([Text("t", "😀😀")], Encoder(bundled_tokenizer))
    assert [window.text for window in windows] == ["😀", "😀"]
    assert [window.id for window in windows] == ["t#0", "t#1"]


def test_what_cannot_be_cut_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False
        bos_token_id = None
        eos_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in text]}

    with pytest.raises(InputError, match="SlowTokenizer does not say which characters its tokens come from"):
        Windows(4).cut([DOCUMENT], Encoder(SlowTokenizer()))
    with pytest.raises(InputError, match="window of 1 tokens: 1 are added before each text"):
        Windows(1).cut([DOCUMENT], Encoder(toy_tokenizer()))
    with pytest.raises(InputError, match="window"):
        Windows(0)
    with pytest.raises(InputError, match="stride"):
        Windows(4, 0)
