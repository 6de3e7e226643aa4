"""Position 0 follows the BOS policy; tokens that a tokenizer appends are left out; cuts are recorded."""

from __future__ import annotations

from typing import Any

import pytest
from tests.toys import toy_tokenizer

from phaselens.data import Encoder, Text, TokenizedText
from phaselens.errors import InputError
from phaselens.testing import tiny_tokenizer

TEXT = Text("t", "a b c")
PLAIN = (3, 4, 5)


def encode(
    tokenizer: Any, text: Text, *, bos: str, bos_token_id: int | None, max_tokens: int
) -> TokenizedText:
    return Encoder(tokenizer, bos=bos, bos_token_id=bos_token_id).tokenize(text, max_tokens)


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


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("bos", ["auto", "always"])
@pytest.mark.parametrize("written", ["<s>", "<s><s>", "<s><s><s>"])
def test_a_written_bos_occurs_once(adds_bos: bool, adds_eos: bool, bos: str, written: str) -> None:
    encoder = Encoder(tiny_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos), bos=bos)
    tokens = encoder.tokenize(Text("t", written + "ab<s>"), 99)
    assert tokens.ids == (0, 12, 13, 0)  # a BOS token within the text stays
    assert (tokens.full_length, tokens.cut, tokens.n_written_bos) == (4, False, written.count("<s>"))


@pytest.mark.parametrize("bos", ["auto", "always"])
@pytest.mark.parametrize("space", [" ", "\n\n", "\t "])
def test_white_space_before_a_written_bos_does_not_add_a_second_one(bos: str, space: str) -> None:
    encoder = Encoder(tiny_tokenizer(), bos=bos)
    tokens = encoder.tokenize(Text("t", f"{space}<s>ab"), 99)
    assert (tokens.ids, tokens.n_written_bos) == (tuple(encoder("ab")), 1)
    assert encoder(f"{space}ab")[0] == 0
    assert len(encoder(f"{space}ab")) == 3 + len(space)
    never = Encoder(tiny_tokenizer(), bos="never")
    assert len(never(f"{space}<s>ab")) == 3 + len(space)


def test_never_keeps_a_written_bos() -> None:
    encoder = Encoder(tiny_tokenizer(), bos="never")
    assert encoder("<s><s>ab") == [0, 0, 12, 13]
    assert encoder("ab") == [12, 13]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_an_appended_eos_is_left_out_and_a_written_one_is_kept(adds_bos: bool) -> None:
    encoder = Encoder(tiny_tokenizer(adds_bos=adds_bos, adds_eos=True))
    front = [0] * adds_bos
    assert encoder.dropped_ids == [1]
    assert encoder("ab") == [*front, 12, 13]
    assert encoder("ab</s>") == [*front, 12, 13, 1]
    assert encoder("ab</s></s>") == [*front, 12, 13, 1, 1]


def test_notes_name_the_texts() -> None:
    encoder = Encoder(tiny_tokenizer(adds_eos=True))
    texts = [Text(name, f"<s>{name}") for name in "abcde"] + [Text("plain", "ab")]
    assert encoder.notes([encoder.tokenize(text, 9) for text in texts]) == [
        "the tokenizer appends '</s>' to a text; it is left out, because nothing continues a text after it",
        "texts 'a', 'b', 'c' and 2 more themselves begin with BOS '<s>'; no second one is added (bos: auto)",
    ]
    plain = Encoder(tiny_tokenizer())
    assert plain.notes([plain.tokenize(texts[-1], 9)]) == []
    never = Encoder(tiny_tokenizer(), bos="never")
    assert never.notes([never.tokenize(texts[0], 9)]) == [
        "text 'a' itself begins with BOS '<s>'; it is kept as text (bos: never)"
    ]


def _with_template(tokenizer: Any, template: str, *ids: tuple[str, int]) -> Any:
    from tokenizers import processors

    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(ids)
    )
    return tokenizer


def test_auto_keeps_other_tokens_that_the_tokenizer_puts_first() -> None:
    """A tokenizer like that of GLM: two special tokens in front, neither of which is called BOS."""
    tokenizer = _with_template(tiny_tokenizer(has_bos=False), "<x> <y> $A", ("<x>", 5), ("<y>", 6))
    assert Encoder(tokenizer)("ab") == [5, 6, 12, 13]
    assert Encoder(tokenizer, bos="never")("ab") == [12, 13]
    assert not Encoder(tokenizer).puts_bos_first


def test_a_tokenizer_that_adds_bos_twice_counts_as_one_that_adds_it() -> None:
    tokenizer = _with_template(tiny_tokenizer(), "<s> <s> $A", ("<s>", 0))
    assert Encoder(tokenizer)("<s>ab") == Encoder(tokenizer)("ab") == [0, 12, 13]


class _Stubborn:
    """A tokenizer that adds `<s>` even without special tokens, as some with custom code do."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": tiny_tokenizer()(text)["input_ids"]}


def test_a_bos_that_is_always_added_is_not_a_written_one() -> None:
    assert Encoder(_Stubborn())("ab") == [0, 12, 13]
    assert Encoder(_Stubborn(), bos="always")("ab") == [0, 12, 13]
    assert Encoder(_Stubborn(), bos="never")("ab") == [12, 13]
    tokens = Encoder(_Stubborn()).tokenize(Text("t", "<s>ab"), 9)
    assert (tokens.ids, tokens.n_written_bos) == ((0, 12, 13), 1)


def test_prefix_and_suffix_are_separated_without_the_probes_in_the_vocabulary() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "é": 2}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    _with_template(tokenizer, "<s> $A </s>", ("<s>", 0), ("</s>", 1))
    encoder = Encoder(tokenizer)
    assert (encoder.prefix_ids, encoder.dropped_ids, encoder("éé")) == ([0], [1], [0, 2, 2])


def test_the_bundled_tokenizer_gives_ordinary_texts_the_recorded_ids() -> None:
    from importlib.resources import files

    from transformers import AutoTokenizer

    from phaselens.data import texts_from

    tokenizer = AutoTokenizer.from_pretrained(str(files("phaselens.data") / "models" / "rope"))
    encoder = Encoder(tokenizer)
    for text in texts_from("bundled", 20):
        assert encoder(text.text) == tokenizer(text.text)["input_ids"]


def test_always_needs_a_bos_token() -> None:
    with pytest.raises(InputError, match="the model has no BOS token; use auto or never"):
        encode(toy_tokenizer(bos=False), TEXT, bos="always", bos_token_id=None, max_tokens=9)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match=r"bos is 'neve'; did you mean never\?"):
        Encoder(toy_tokenizer(), bos="neve")


def test_a_long_text_is_cut_and_keeps_its_full_length() -> None:
    tokens = encode(toy_tokenizer(), TEXT, bos="auto", bos_token_id=0, max_tokens=2)
    assert (tokens.ids, tokens.full_length, tokens.cut) == ((0, 3), 4, True)
    uncut = encode(toy_tokenizer(), TEXT, bos="auto", bos_token_id=0, max_tokens=4)
    assert (uncut.full_length, uncut.cut) == (4, False)


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(InputError, match=r"text 'blank' has no tokens \(bos: never\)"):
        encode(toy_tokenizer(), Text("blank", " "), bos="never", bos_token_id=0, max_tokens=9)
    with pytest.raises(InputError, match=r"text 'blank' has no tokens \(bos: auto\)"):
        encode(
            tiny_tokenizer(adds_bos=False, adds_eos=True),
            Text("blank", ""),
            bos="auto",
            bos_token_id=0,
            max_tokens=9,
        )
