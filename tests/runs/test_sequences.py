"""Metrics that read token sequences of their own: groups stay together, a nulled rotation is theirs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError, MetricError
from phaselens.plugin import (
    Batch,
    CausalMetric,
    Column,
    Condition,
    Edit,
    Encoder,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    TokenSequence,
)
from phaselens.runs import Run, feed_metric
from phaselens.runs.sequences import pack_groups
from phaselens.testing import tiny_lens
from tests.toys import letters, toy_lens


class SequenceReader(Metric[Params]):
    """Keeps the residual after the last layer of each sequence, and which sequences shared a batch."""

    name, version = "sequence-reader", "1"
    tables = (TableSpec("layers", (Column("layer", int), Column("n", int))),)

    def setup(self) -> None:
        self.residuals: dict[str, torch.Tensor] = {}
        self.batches: list[tuple[str, ...]] = []
        self.texts: list[Batch] = []

    def hooks(self) -> Sequence[str]:
        return [f"blocks.{self.model.n_layers - 1}.hook_resid_post"]

    def sequences(self, texts: Batch, tokenizer: Any) -> Sequence[TokenSequence] | None:
        self.texts.append(texts)
        return self.chosen(texts, tokenizer)

    def chosen(self, texts: Batch, tokenizer: Any) -> Any:
        """Each text backwards, beside the text itself."""
        sequences = []
        for index, length in enumerate(texts.lengths):
            ids = texts.tokens[index, :length].tolist()
            group = f"text {texts.indices[index]}"
            sequences += [
                TokenSequence(f"{group}, as it is", ids, group),
                TokenSequence(f"{group}, backwards", [ids[0], *ids[:0:-1]], group),
            ]
        return sequences

    def update(self, layer: LayerView) -> None:
        self.batches.append(layer.batch.texts)
        for row, (name, length) in enumerate(zip(layer.batch.texts, layer.batch.lengths, strict=True)):
            self.residuals[name] = layer["hook_resid_post"][row, :length].clone()

    def compute(self) -> Mapping[str, Table]:
        return {"layers": self.table("layers", [(0, len(self.residuals))])}


def reading(chosen: Any) -> type[SequenceReader]:
    """A metric that reads the sequences that `chosen(self, texts, tokenizer)` returns."""
    return type("ChosenReader", (SequenceReader,), {"chosen": chosen})


def fed(metric_class: type[SequenceReader], lens: Any, texts: Sequence[str]) -> SequenceReader:
    """Return an instance that has read its sequences of these texts."""
    metric = metric_class(lens.info, Params())
    tokenized = [lens.encoder().tokenize(text, 100) for text in phaselens.data.texts_from(list(texts))]
    feed_metric(lens, tokenized, metric, [[index] for index in range(len(tokenized))])
    return metric


def test_each_group_is_in_one_batch_and_each_sequence_is_read_as_it_would_be_alone() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    metric = fed(SequenceReader, lens, [letters(9), letters(4, 3), letters(30, 5)])
    assert sorted(name for batch in metric.batches for name in batch) == sorted(metric.residuals)
    for index in range(3):
        names = f"text {index}, as it is", f"text {index}, backwards"
        (batch,) = [batch for batch in metric.batches if names[0] in batch]
        assert batch[batch.index(names[0]) :][:2] == names
    ids = torch.tensor([lens.text_tokenizer(letters(9))["input_ids"]])
    for name, tokens in (("as it is", ids), ("backwards", torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1))):
        separate = lens.stream(tokens, stop_at_layer=2)[0]
        torch.testing.assert_close(metric.residuals[f"text 0, {name}"], separate, rtol=1e-12, atol=1e-12)


def test_the_metric_gets_all_texts_at_once() -> None:
    metric = fed(SequenceReader, toy_lens(), [letters(9), letters(4, 3)])
    (texts,) = metric.texts
    assert (texts.texts, texts.lengths, texts.indices) == (("0", "1"), (10, 5), (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_a_nulled_rotation_is_that_of_a_model_loaded_without_rotation(family: str) -> None:
    def without_rotation(self: SequenceReader, texts: Batch, tokenizer: Any) -> list[TokenSequence]:
        ids = texts.tokens[0, : texts.lengths[0]].tolist()
        return [TokenSequence("rotated", ids), TokenSequence("nulled", ids, rotation_mode="nope")]

    lens, nulled = tiny_lens(family), tiny_lens(family, positions="nope")
    metric = fed(reading(without_rotation), lens, ["to be or not to be"])
    tokens = lens.to_tokens("to be or not to be")
    assert torch.equal(metric.residuals["rotated"], lens.stream(tokens, stop_at_layer=2)[0])
    assert torch.equal(metric.residuals["nulled"], nulled.stream(tokens, stop_at_layer=2)[0])
    assert lens.nulled_layers == ()


def test_a_rotation_that_cannot_be_nulled_fails_that_metric_with_the_reason() -> None:
    def without_rotation(self: SequenceReader, texts: Batch, tokenizer: Any) -> list[TokenSequence]:
        return [TokenSequence("nulled", [0, 5, 7], rotation_mode="nope")]

    with pytest.raises(MetricError, match="positions=nope cannot be served"):
        fed(reading(without_rotation), tiny_lens("gpt2"), ["to be"])


def run(metric: type[Metric[Any]], **options: Any) -> Run:
    return phaselens.run(
        toy_lens(), metrics=[metric, "bos-norm"], texts=[letters(9), letters(5, 2)], **options
    )


def test_prompts_of_its_own_are_encoded_as_the_run_encodes_texts() -> None:
    def prompts(self: SequenceReader, texts: Batch, tokenizer: Any) -> list[TokenSequence]:
        encode = Encoder(tokenizer, bos=self.model.bos, bos_token_id=self.model.bos_token_id)
        tokenizer.add_bos_token = False  # it is a copy
        return [TokenSequence("prompt", encode("a b c"))]

    lens = toy_lens()
    metric = fed(reading(prompts), lens, [letters(3)])
    assert metric.batches == [("prompt",)]
    assert len(metric.residuals["prompt"]) == 4
    assert len(lens.to_tokens("a b c")[0]) == 4


def test_other_metrics_read_the_texts() -> None:
    result = run(SequenceReader)
    assert result.rows("sequence-reader", "layers").column("n") == [4]
    assert result.rows("bos-norm", "texts").column("n_tokens") == [10, 10, 6, 6]


def test_without_sequences_the_texts_are_read() -> None:
    metric = fed(reading(lambda self, texts, tokenizer: None), toy_lens(), [letters(9)])
    assert metric.batches == [("0",)]


def test_a_causal_metric_can_read_other_sequences_than_those_on_which_it_runs_conditions() -> None:
    class CausalReader(CausalMetric[Params]):
        name, version = "causal-reader", "1"

        def hooks(self) -> Sequence[str]:
            return ["blocks.0.hook_resid_post"]

        def sequences(self, texts: Batch, tokenizer: Any) -> Sequence[TokenSequence]:
            return [TokenSequence("only", [0, 5, 7])]

        def update(self, layer: LayerView) -> None:
            assert layer.batch.texts == ("only",)
            self.value = float(layer["hook_resid_post"].mean())

        def conditions(self) -> Sequence[Condition]:
            return [Condition("written", [Edit("blocks.0.hook_resid_post", self.value)])]

    assert run(CausalReader).rows("causal-reader", "texts").column("text") == ["0", "0", "1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "sequences() returned the int 3; return a list of TokenSequences, or None for the run's texts"),
        (["a"], "sequences() holds the str 'a'; return a list of TokenSequences"),
        ([TokenSequence("a", [1]), TokenSequence("a", [2])], "two have the id 'a'; give each its own"),
        (
            [TokenSequence("a", [1], "g"), TokenSequence("b", [2], "g", "nope")],
            "those of group 'g' have the rotation modes auto and nope; one batch has one",
        ),
    ],
)  # fmt: skip
def test_what_sequences_returns_is_checked(returned: Any, message: str) -> None:
    (failure,) = run(reading(lambda self, texts, tokenizer: returned)).metrics["sequence-reader"].failures
    assert message in str(failure)
    assert failure.stage == "sequences"
    assert "test_sequences.py" in str(failure.where)


def test_tokens_that_the_model_does_not_have_fail_the_metric() -> None:
    result = run(reading(lambda self, texts, tokenizer: [TokenSequence("a", [999])]))
    (failure,) = result.metrics["sequence-reader"].failures
    assert "999" in str(failure)
    assert result.rows("bos-norm", "layers").column("layer") == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id": 3, "ids": [1]}, "a sequence's id is the int 3; give text"),
        ({"id": "a", "ids": None}, "sequence 'a': its ids are None"),
        ({"id": "a", "ids": []}, "sequence 'a' has no ids; give at least one"),
        ({"id": "a", "ids": [1.5]}, "sequence 'a': its ids contain 1.5; give whole numbers from 0"),
        ({"id": "a", "ids": [1], "group": 3}, "sequence 'a': its group is the int 3; give text, or None"),
        ({"id": "a", "ids": [1], "rotation_mode": "no"}, "its rotation_mode is 'no'; give auto or nope"),
    ],
)
def test_a_sequence_checks_its_fields(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenSequence(**arguments)


def sequence(name: str, length: int, group: str | None = None, mode: str = "auto") -> TokenSequence:
    return TokenSequence(name, [1] * length, group, mode)


def test_groups_are_packed_whole_longest_first_and_by_mode() -> None:
    sequences = [
        sequence("a", 3), sequence("b", 9, "g"), sequence("c", 8, mode="nope"), sequence("d", 9, "g"),
        sequence("e", 9, mode="nope"), sequence("f", 8),
    ]  # fmt: skip
    assert list(pack_groups(sequences, 27)) == [[1, 3, 5], [0], [4, 2]]
    assert list(pack_groups(sequences, 1)) == [[1, 3], [5], [0], [4], [2]]
    assert list(pack_groups([], 10)) == []


def test_a_group_may_have_the_name_of_another_sequence() -> None:
    sequences = [sequence("a", 2, "b"), sequence("b", 2), sequence("c", 2, "b")]
    assert list(pack_groups(sequences, 2)) == [[0, 2], [1]]


def test_a_prompt_with_edits_refuses_such_a_metric() -> None:
    from phaselens import patching

    experiment = patching.Experiment(patching.prompt(tiny_lens("llama"), "to be"))
    with pytest.raises(InputError, match="over-mixing reads token sequences of its own"):
        experiment.measure("over-mixing")
