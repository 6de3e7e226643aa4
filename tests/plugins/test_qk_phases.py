"""Queries and keys overwritten at decode as in the prompt, in any order of texts and conditions; and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phaselens.errors import InputError
from phaselens.plugin import Condition
from phaselens.runs.interventions import applied
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
    """A condition as a run on TEXTS declares it."""
    from phaselens.data import Encoder, texts_from
    from phaselens.runs import gather

    encoder = Encoder(lens.text_tokenizer, bos_token_id=0)
    texts = [encoder.tokens(text, 512) for text in texts_from(TEXTS)]
    metric = QkDisruption(lens.info, QkParams(conditions=name))
    gather(lens, texts, metric, [[0, 1, 2, 3]])
    return next(one for one in metric.conditions() if one.name == name)


@pytest.mark.parametrize("name", ["top-1", "top-1-mean"])
def test_it_acts_at_decode_as_in_the_prompt(lens: Any, name: str) -> None:
    """A mean over the one token of a decode step would be that token's own value, and nothing would happen."""
    ids = ids_of(lens, letters(12, 5))
    model = lens.original_model
    condition = first_condition(lens, name)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with applied(lens, condition):
            whole = model(ids, use_cache=False).logits
            prompt = model(ids[:, :6], use_cache=True)
            steps, cache = [prompt.logits[:, -1]], prompt.past_key_values
            for place in range(6, ids.shape[1]):
                step = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
                steps.append(step.logits[:, -1])
                cache = step.past_key_values
        prompt = model(ids[:, :6], use_cache=True)
        with applied(lens, condition):
            decoded = model(ids[:, 6:7], past_key_values=prompt.past_key_values, use_cache=True).logits
    assert torch.allclose(torch.stack(steps, 1), whole[:, 5:], rtol=0, atol=1e-9)
    assert (whole[:, 5:] - plain[:, 5:]).abs().max() > 1e-3
    assert (decoded[:, 0] - plain[:, 6]).abs().max() > 1e-4


@pytest.mark.slow
def test_order_and_batches_change_no_number(lens: Any) -> None:
    params = {"conditions": "all", "multiple": 1.6}
    one = run(NAME, lens, params=params, batch_tokens=1)
    texts = [phaselens_text(place) for place in (2, 0, 3, 1)]
    other = run(NAME, lens, texts, params={"conditions": ",".join(reversed(list_of(one))), "multiple": 1.6})
    for table, key in (("conditions", "condition"), ("contrasts", "control"), ("dimensions", "condition")):
        for first, second in zip(rows(one, NAME, table), rows(other, NAME, table), strict=True):
            assert first[key] == second[key]
            for column, value in first.items():
                assert second[column] == (
                    pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                )


def phaselens_text(place: int) -> Any:
    """One of TEXTS under the id that it has in a run of all of them."""
    from phaselens.data import Text

    return Text(str(place), TEXTS[place])


def list_of(found: Any) -> list[str]:
    return [r["condition"] for r in rows(found, NAME) if r["condition"] != "baseline"]


def test_an_edit_makes_a_new_tensor(lens: Any) -> None:
    """A hook that returns None, or writes into the tensor (which may be the cache's), is the trap."""
    condition = first_condition(lens, "top-1")
    edit = next(one for one in condition.edits if one.point.endswith("rot_q"))
    assert callable(edit.to)
    tensor = torch.ones(2, 3, 4, 8)
    site = type("Site", (), {"batch": None})()
    new = edit.to(tensor, site)
    assert bool((tensor == 1).all())
    assert int((new == 0).sum()) == 2 * 3 * 4


@pytest.mark.parametrize("asked", ["masive", "massive,,top-1", ""])
def test_unknown_conditions_are_refused(asked: str) -> None:
    with pytest.raises(InputError, match="random-norm"):
        QkParams.parse({"conditions": asked})


def test_a_control_brings_what_it_controls() -> None:
    assert QkParams(conditions="random-any, top-1").asked == ["massive", "random-any", "top-1"]


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(QkDisruption)
    check_metric(QkDisruption, {"conditions": "all", "multiple": "1.3", "rotation": "pre", "seeds": "1"})
