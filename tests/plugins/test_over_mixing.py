"""The spread of a changed token against separate forwards, planted truths, settings and hostile texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.runs import Run
from phaselens.testing import check_metric, tiny_lens
from phaselens_plugins._mixing_sequences import AS_IS, NEITHER, NO_BOS, NO_ROTATION, replacements
from phaselens_plugins.over_mixing import OverMixing
from tests.toys import letters, toy_lens

TEXTS = [letters(20), letters(31, 5), letters(12, 11) + " a a a b"]


def run(lens: Any, texts: Sequence[str] = TEXTS, **params: Any) -> Run:
    result = phaselens.run(lens, metrics=[("over-mixing", params)], texts=list(texts))
    assert not result.failed, [str(failure) for failure in result.metrics["over-mixing"].failures]
    return result


def records(result: Run, table: str, **chosen: Any) -> list[dict[str, Any]]:
    rows = result.rows("over-mixing", table).records()
    return [row for row in rows if all(row[name] == value for name, value in chosen.items())]


def residuals(lens: Any, ids: Sequence[int], layer: int) -> np.ndarray:
    collected: list[np.ndarray] = []
    point = f"blocks.{layer}.hook_resid_post"
    lens.stream(torch.tensor([list(ids)]), [(point, lambda x, hook: collected.append(x[0].numpy()))])
    return collected[0]


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=1)


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def result(lens: Any) -> Run:
    return run(lens, threshold=0.05)


def changed_ids(lens: Any, result: Run, text: int, token: str) -> tuple[list[int], list[int], int]:
    """Return a text's ids, those with the token replaced as the table says, and the position."""
    ids = lens.text_tokenizer(TEXTS[text])["input_ids"]
    (row,) = records(result, "replacements", text=str(text), token=token)
    assert lens.text_tokenizer.convert_ids_to_tokens(ids[row["position"]]) == row["old"]
    new = lens.text_tokenizer.convert_tokens_to_ids(row["new"])
    return ids, [*ids[: row["position"]], new, *ids[row["position"] + 1 :]], row["position"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", [AS_IS, NO_BOS, NO_ROTATION, NEITHER])
def test_change_and_collapse_equal_those_of_separate_forwards(lens: Any, result: Run, setting: str) -> None:
    reference = lens if setting in (AS_IS, NO_BOS) else toy_lens("llama-gqa", dtype=torch.float64)
    if reference is not lens:
        reference.set_rotation(nulled=True)
    start = 1 if setting in (NO_BOS, NEITHER) else 0
    collapses = []
    for text in range(len(TEXTS)):
        for token in ("given", "middle"):
            ids, new_ids, position = changed_ids(lens, result, text, token)
            for layer in range(2):
                x, y = (residuals(reference, sequence[start:], layer) for sequence in (ids, new_ids))
                change = norms(y - x) / norms(x)
                later = change[position - start + 1 :]
                (row,) = records(result, "texts", text=str(text), token=token, setting=setting, layer=layer)
                assert row["change"] == pytest.approx(later.mean(), rel=1e-8)
                assert row["own"] == pytest.approx(change[position - start], rel=1e-8)
                assert row["reached"] == pytest.approx((later >= 0.05).mean())
                assert row["n_later"] == len(later)
                assert change[: position - start].max(initial=0.0) < 1e-12
        x = residuals(reference, ids[start:], 1)[1:]
        collapses.append(norms(x - x.mean(0)) @ norms(x - x.mean(0)) / (norms(x) @ norms(x)))
    (row,) = records(result, "collapse", setting=setting, layer=1)
    assert row["collapse"] == pytest.approx(np.sqrt(collapses).mean(), rel=1e-8)


def test_bins_hold_the_mean_change_at_their_distances(lens: Any, result: Run) -> None:
    expected: dict[int, list[float]] = {}
    for text in range(len(TEXTS)):
        ids, new_ids, position = changed_ids(lens, result, text, "given")
        x, y = residuals(lens, ids, 1), residuals(lens, new_ids, 1)
        change = norms(y - x) / norms(x)
        for start in (1, 2, 4, 8, 16):
            in_bin = change[position + start : position + 2 * start]
            if len(in_bin):
                expected.setdefault(start, []).append(in_bin.mean())
    rows = records(result, "distances", setting=AS_IS, token="given", layer=1)
    assert [(row["first"], row["last"], row["n_texts"]) for row in rows] == [
        (start, 2 * start - 1, len(values)) for start, values in expected.items()
    ]
    for row in rows:
        assert row["change"] == pytest.approx(np.mean(expected[row["first"]]), rel=1e-8)


def test_settings_and_layers_are_means_of_the_texts(result: Run) -> None:
    for row in records(result, "settings"):
        chosen = {name: row[name] for name in ("setting", "token", "layer")}
        change = [text["change"] for text in records(result, "texts", **chosen)]
        assert row["change"] == pytest.approx(np.mean(change))
        as_is = [text["change"] for text in records(result, "texts", **(chosen | {"setting": AS_IS}))]
        if row["setting"] == AS_IS:
            assert row["difference"] is None
        else:
            assert row["difference"] == pytest.approx(np.mean(change) - np.mean(as_is))
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    for row in records(result, "layers"):
        for column, setting, token in (
            ("change", AS_IS, "given"),
            ("no_bos", NO_BOS, "given"),
            ("no_rotation", NO_ROTATION, "given"),
            ("middle_no_bos", NO_BOS, "middle"),
        ):
            (source,) = records(result, "settings", setting=setting, token=token, layer=row["layer"])
            assert row[column] == source["change"]
    (summary,) = records(result, "summary")
    assert summary["change"] == records(result, "layers", layer=1)[0]["change"]


def test_without_attention_nothing_spreads() -> None:
    """A planted truth: where the output projection of attention is zero, later tokens do not see the change."""
    lens = tiny_lens("llama", dtype=torch.float64)
    with torch.no_grad():
        for layer in lens.original_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for row in records(run(lens, ["to be or not to be"]), "texts"):
        assert row["change"] < 1e-15  # a product of matrices may round rows of a batch differently
        assert row["reached"] == 0.0
        assert row["own"] > 0.1


def test_tokens_that_are_all_alike_have_collapsed() -> None:
    """A planted truth: without attention, equal tokens have equal residuals."""
    lens = tiny_lens("llama", dtype=torch.float64)
    with torch.no_grad():
        for layer in lens.original_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    result = run(lens, ["aaaaaaaaaaaa", "to be"])
    per_text = run(lens, ["aaaaaaaaaaaa"])
    assert all(row["collapse"] < 1e-12 for row in records(per_text, "collapse"))
    for row in records(per_text, "collapse", setting=AS_IS):
        assert row["collapse_rest_null"] == pytest.approx((1 - 1 / 12) ** 0.5)
    assert any("no other token to put there, for text '0'" in note for note in result.warnings)
    assert {row["text"] for row in records(result, "texts")} == {"1"}


def test_without_rotation_is_the_model_loaded_without_rotation(lens: Any, result: Run) -> None:
    nulled = toy_lens("llama-gqa", dtype=torch.float64)
    nulled.set_rotation(nulled=True)
    loaded = run(nulled, threshold=0.05)
    for setting, nulled_setting in ((NO_ROTATION, AS_IS), (NEITHER, NO_BOS)):
        expected = records(loaded, "texts", setting=nulled_setting)
        for row, expected_row in zip(records(result, "texts", setting=setting), expected, strict=True):
            assert row["change"] == pytest.approx(expected_row["change"], rel=1e-10)
    assert records(loaded, "texts", setting=NO_ROTATION) == []
    assert any(
        "change without rotation is missing: the model's positions are nope" in n for n in loaded.warnings
    )


def test_the_new_token_is_about_as_frequent_and_depends_on_the_text_alone() -> None:
    ids = [0, *[5] * 8, *[6] * 9, *[7] * 2, *[8] * 2, 9, 10, 11]
    options: dict[str, Any] = {"token": 1, "draws": 1, "seed": 0}
    (first, middle) = replacements(ids, "a", **options)
    assert (first.position, first.old_id, first.new_id) == (1, 5, 6)
    assert (first.frequency_class, first.new_class) == (3, 3)
    assert (middle.position, middle.old_id, middle.new_id) == (12, 6, 5)
    assert next(replacements([0, 5, 5, 5, 5, 7, 8], "a", **options)).new_id in (7, 8)
    drawn = list(replacements(ids, "a", **options | {"token": 22, "draws": 9}))
    assert {change.new_id for change in drawn if change.token == "given"} == {10, 11}
    assert list(replacements([0, 5, 5], "a", **options)) == []
    assert list(replacements([0, 5], "a", **options)) == []
    assert list(replacements([0], "a", **options)) == []


def test_more_draws_are_averaged(lens: Any) -> None:
    text = letters(20)
    result = run(lens, [text], draws=3)
    rows = records(result, "replacements", token="given")
    assert len({row["new"] for row in rows}) == 3
    ids = lens.text_tokenizer(text)["input_ids"]
    x = residuals(lens, ids, 0)
    changes = []
    for row in rows:
        new_ids = [*ids[:1], lens.text_tokenizer.convert_tokens_to_ids(row["new"]), *ids[2:]]
        changes.append((norms(residuals(lens, new_ids, 0) - x) / norms(x))[2:].mean())
    (row,) = records(result, "texts", setting=AS_IS, token="given", layer=0)
    assert row["change"] == pytest.approx(np.mean(changes), rel=1e-8)


def test_texts_without_bos_have_no_setting_without_it() -> None:
    lens = toy_lens()
    mixed = phaselens.run(lens, metrics=["over-mixing"], texts=[letters(9)], bos="never")
    assert {row["setting"] for row in records(mixed, "texts")} == {AS_IS, NO_ROTATION}
    notes = " | ".join(map(str, mixed.warnings))
    assert "change without BOS is missing: the text does not begin with BOS, for text '0'" in notes


def test_learned_positions_keep_their_rotation_setting_missing() -> None:
    result = run(toy_lens("gpt2"))
    assert {row["setting"] for row in records(result, "texts")} == {AS_IS, NO_BOS}
    assert any("the model's positions are learned" in note for note in result.warnings)


def test_settings_that_are_not_wanted_are_not_run(lens: Any) -> None:
    result = run(lens, without_bos=False, without_rotation=False)
    assert {row["setting"] for row in records(result, "texts")} == {AS_IS}
    assert not any("missing" in str(note) for note in result.warnings)


def test_a_layer_that_is_not_finite_is_missing_with_its_reason() -> None:
    lens = toy_lens()
    with torch.no_grad():
        lens.original_model.model.layers[1].mlp.down_proj.weight[:] = torch.inf
    result = phaselens.run(lens, metrics=["over-mixing"], texts=[letters(9), letters(12)])
    rows: Sequence[Mapping[str, Any]] = records(result, "settings", setting=AS_IS, token="given")
    assert [row["change"] is None for row in rows] == [False, True]
    assert any("residuals are zero, NaN or infinite in layer 1" in note for note in result.warnings)


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(OverMixing)
    check_metric(OverMixing, {"draws": 2, "token": 2, "without_bos": False})
