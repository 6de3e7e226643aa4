"""Position 0 holds what the BOS policy says, and cutting is recorded."""

import pytest
from tests.toys import toy_tokenizer

from phaselens.data import Text, encode
from phaselens.errors import InputError

TEXT = Text("t", "a b c")
PLAIN = (3, 4, 5)


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [
        (True, "auto", (0, *PLAIN)),
        (False, "auto", PLAIN),
        (True, "always", (0, *PLAIN)),
        (False, "always", (0, *PLAIN)),
        (True, "never", PLAIN),
        (False, "never", PLAIN),
    ],
)
def test_bos_is_where_the_policy_puts_it(adds_bos: bool, bos: str, expected: tuple[int, ...]) -> None:
    tokenizer = toy_tokenizer(adds_bos=adds_bos)
    assert encode(tokenizer, TEXT, bos=bos, bos_token_id=0, max_tokens=99).ids == expected


def test_always_needs_a_bos_token() -> None:
    with pytest.raises(InputError, match="the model has no BOS token; use auto or never"):
        encode(toy_tokenizer(bos=False), TEXT, bos="always", bos_token_id=None, max_tokens=9)


def test_a_long_text_is_cut_and_says_so() -> None:
    tokens = encode(toy_tokenizer(), TEXT, bos="auto", bos_token_id=0, max_tokens=2)
    assert (tokens.ids, tokens.full_length, tokens.cut) == ((0, 3), 4, True)
    whole = encode(toy_tokenizer(), TEXT, bos="auto", bos_token_id=0, max_tokens=4)
    assert (whole.full_length, whole.cut) == (4, False)


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(InputError, match=r"text 'blank' has no tokens \(bos: never\)"):
        encode(toy_tokenizer(), Text("blank", " "), bos="never", bos_token_id=0, max_tokens=9)
