"""qk-disruption at decode and in the prompt, in any order of texts and conditions; and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phaselens.errors import InputError
from phaselens.plugin import Condition
from phaselens.runs import applied
from phaselens.testing import check_metric
from phaselens_plugins.qk_disruption import QkDisruption, QkParams
from tests.plugins.ablations import TEXTS, rows, run
from tests.plugins.qk_models import ids_of
from tests.toys import letters, toy_lens

NAME = "qk-disruption"


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


def first_condition(lens: Any, name: str) -> Condition:
    """Return a condition that a run on TEXTS declares."""
    from phaselens.data import Encoder, texts_from
    from phaselens.runs import feed_metric

    encoder = Encoder(lens.text_tokenizer, bos_token_id=0)
    texts = [encoder.tokenize(text, 512) for text in texts_from(TEXTS)]
    metric = QkDisruption(lens.info, QkParams(conditions=name))
    feed_metric(lens, texts, metric, [[0, 1, 2, 3]])
    return next(condition for condition in metric.conditions() if condition.name == name)


@pytest.mark.parametrize("name", ["top-1", "top-1-mean"])
def test_the_edit_is_the_same_at_decode_and_in_the_prompt(lens: Any, name: str) -> None:
    """A mean over the single token of a decode step would be that token's value, and would have no effect."""
    ids = ids_of(lens, letters(12, 5))
    model = lens.original_model
    condition = first_condition(lens, name)
    with torch.no_grad():
        unedited = model(ids, use_cache=False).logits
        with applied(lens, condition):
            whole_logits = model(ids, use_cache=False).logits
            prompt = model(ids[:, :6], use_cache=True)
            steps, cache = [prompt.logits[:, -1]], prompt.past_key_values
            for position in range(6, ids.shape[1]):
                step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                steps.append(step.logits[:, -1])
                cache = step.past_key_values
        prompt = model(ids[:, :6], use_cache=True)
        with applied(lens, condition):
            decoded = model(ids[:, 6:7], past_key_values=prompt.past_key_values, use_cache=True).logits
    assert torch.allclose(torch.stack(steps, 1), whole_logits[:, 5:], rtol=0, atol=1e-9)
    assert (whole_logits[:, 5:] - unedited[:, 5:]).abs().max() > 1e-3
    assert (decoded[:, 0] - unedited[:, 6]).abs().max() > 1e-4


@pytest.mark.slow
def test_order_and_batches_change_no_number(lens: Any) -> None:
    params = {"conditions": "all", "multiple": 1.6}
    expected = run(NAME, lens, params=params, batch_tokens=1)
    texts = [text_with_id(index) for index in (2, 0, 3, 1)]
    actual = run(
        NAME,
        lens,
        texts,
        params={"conditions": ",".join(reversed(condition_names(expected))), "multiple": 1.6},
    )
    for table, key in (("conditions", "condition"), ("contrasts", "control"), ("dimensions", "condition")):
        for expected_row, actual_row in zip(
            rows(expected, NAME, table), rows(actual, NAME, table), strict=True
        ):
            assert expected_row[key] == actual_row[key]
            for column, value in expected_row.items():
                assert actual_row[column] == (
                    pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                )


def text_with_id(index: int) -> Any:
    """Return one of TEXTS with the id that it has in a run of all of them."""
    from phaselens.data import Text

    return Text(str(index), TEXTS[index])


def condition_names(result: Any) -> list[str]:
    return [r["condition"] for r in rows(result, NAME) if r["condition"] != "baseline"]


def test_an_edit_returns_a_new_tensor(lens: Any) -> None:
    """A hook must not return None, nor write into the tensor, which may belong to the cache."""
    condition = first_condition(lens, "top-1")
    edit = next(candidate for candidate in condition.edits if candidate.point.endswith("rot_q"))
    assert callable(edit.to)
    tensor = torch.ones(2, 3, 4, 8)
    site = type("Site", (), {"batch": None})()
    edited = edit.to(tensor, site)
    assert bool((tensor == 1).all())
    assert int((edited == 0).sum()) == 2 * 3 * 4


@pytest.mark.parametrize("conditions", ["masive", "massive,,top-1", ""])
def test_unknown_conditions_are_refused(conditions: str) -> None:
    with pytest.raises(InputError, match="random-norm"):
        QkParams.parse({"conditions": conditions})


def test_a_control_includes_the_condition_it_controls_for() -> None:
    assert QkParams(conditions="random-any, top-1").recipe_names == ["massive", "random-any", "top-1"]


@pytest.mark.slow
def test_the_metric_keeps_the_contract() -> None:
    check_metric(QkDisruption)
    check_metric(QkDisruption, {"conditions": "all", "multiple": "1.3", "rotation": "pre", "seeds": "1"})
