"""docs/families.md says what happens to a model of each type, and its numbers come from an independent reference."""

from __future__ import annotations

import random
import time

import pytest
import torch
from tools.families.configs import class_name_of, model_types, tiny_config
from tools.families.dense import dense_attention
from tools.families.models import tiny_model
from tools.families.page import PAGE, SERVED, errors, verdict, verdicts, with_results
from tools.families.survey import _refuse_other_programs, survey
from tools.families.trial import DTYPES, Trial, measure, text, try_model_type

import phaselens

TYPES = model_types()
VERDICTS = verdicts(PAGE.read_text(encoding="utf-8"))


def contradictions(sample: list[str], dtypes: tuple[str, ...] = DTYPES) -> dict[str, str]:
    """Try model types; return those whose result is not the page's, with the result."""
    return {
        f"{trial.model_type} in {dtype}": f"{verdict(trial, dtype)}: {trial}"
        for trial in survey(sample, dtypes=dtypes)
        for dtype in dtypes
        if not is_on_page(trial, dtype)
    }


def is_on_page(trial: Trial, dtype: str) -> bool:
    """Return whether the page has the verdict, and no smaller error than another machine's rounding explains."""
    page = PAGE.read_text(encoding="utf-8")
    # A type that a newer transformers has and the page lacks only has to be served or refused.
    result = verdict(trial, dtype)
    if result != verdicts(page, dtype).get(trial.model_type, result):
        return False
    measurement, error = trial.measurements.get(dtype), errors(page, dtype).get(trial.model_type)
    return measurement is None or error is None or measurement.worst <= 5 * error


def test_the_page_has_a_row_for_each_type_and_their_count_in_its_first_line() -> None:
    title = PAGE.read_text(encoding="utf-8").splitlines()[0]
    n_served = sum(result == SERVED for result in VERDICTS.values())
    assert title.startswith(f"# Model families: {n_served} of the {len(VERDICTS)} causal language models")
    assert len(VERDICTS) == 189


@pytest.mark.slow
def test_a_random_dozen_of_types_gives_what_the_page_says() -> None:
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    sample = random.Random(seed).sample(TYPES, 12)
    assert contradictions(sample) == {}, f"seed {seed}; if the lens is right, run: make families"


@pytest.mark.slow
@pytest.mark.parametrize("third", range(3))
def test_every_type_gives_what_the_page_says(third: int) -> None:
    """In float32 and, to halve the time, in one of the dtypes beside it; `make families` tries all of them."""
    dtypes = (DTYPES[0], DTYPES[1 + third])
    assert contradictions(TYPES[third::3], dtypes) == {}, "if the lens is right, run: make families"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_the_dense_reference_is_the_attention_that_the_model_itself_returns(model_type: str) -> None:
    model = tiny_model(model_type, attention="eager").double()
    with torch.no_grad():
        output = model(text(), output_attentions=True, use_cache=False)
    logits, attentions = dense_attention(model, text())
    assert [attention.layer for attention in attentions] == [0, 1]
    # The model's own softmax is in float32.
    for attention, pattern in zip(attentions, output.attentions, strict=True):
        torch.testing.assert_close(attention.pattern, pattern.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=0)


def test_the_dense_reference_undoes_the_shift_of_learned_sink_logits() -> None:
    model = tiny_model("gpt_oss", attention="eager").double()
    _, attentions = dense_attention(model, text())
    for attention in attentions:
        sinks = model.model.layers[attention.layer].self_attn.sinks.detach()
        missing = (sinks[None, :, None] - attention.lse).exp()
        torch.testing.assert_close(attention.pattern.sum(-1) + missing, torch.ones_like(missing))


def test_the_dense_reference_knows_sink_logits_that_scale_the_output() -> None:
    """Granite multiplies each row's output by sigmoid(lse − sink), which is 1 minus the sink logit's share."""
    model = tiny_model("granite_swa", attention="eager").double()
    _, attentions = dense_attention(model, text())
    for attention in attentions:
        sinks = model.model.layers[attention.layer].self_attn.sinks.detach()
        share = torch.sigmoid(attention.scores.logsumexp(-1) - sinks[None, :, None])
        torch.testing.assert_close(attention.pattern.sum(-1), share)


def test_an_error_in_a_model_is_measured() -> None:
    """The lens of a model whose queries are scaled by 1.001 differs from the dense attention of the model without."""
    _, attentions = dense_attention(tiny_model("llama", attention="eager").double(), text())
    model = tiny_model("llama")
    with torch.no_grad():
        own_logits = model(text()).logits.double()
        model.model.layers[1].self_attn.q_proj.weight *= 1.001
    measurement = measure(phaselens.load(model), text(), own_logits, attentions)
    assert measurement.worst > 1e-5
    assert measurement.logits > 1e-5


def test_a_layer_of_each_kind_is_in_a_tiny_config() -> None:
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny_config("gemma3").text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("deepseek_v3").first_k_dense_replace < tiny_config("deepseek_v3").num_hidden_layers


def test_a_type_that_cannot_be_built_is_reported_with_the_reason() -> None:
    trial = try_model_type("gemma4_assistant")
    assert "shared_kv_states" in trial.unbuildable or "cache" in trial.unbuildable  # before transformers 5.24
    assert not trial.is_served


def test_a_trial_without_a_result_in_time_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.families.survey._SECONDS", 0)
    (trial,) = survey(["llama"])
    assert "within 0 s" in trial.problems["float32"]


def test_a_model_that_starts_a_program_is_stopped() -> None:
    with pytest.raises(RuntimeError, match=r"subprocess\.Popen .* must not start a program"):
        _refuse_other_programs("subprocess.Popen", ("cc",))
    _refuse_other_programs("open", ("config.json",))


def test_the_page_is_read_by_dtype() -> None:
    row = "| `x` | `X` | 2e-06 | problem | refused | 0 (no attention) | rope | float16: why |"
    assert [verdicts(row, dtype)["x"] for dtype in DTYPES] == ["served", "problem", "refused", "served"]
    assert [errors(row, dtype) for dtype in DTYPES] == [{"x": 2e-06}, {}, {}, {"x": 0.0}]


def test_results_replace_the_count_and_the_rows() -> None:
    trials = [
        Trial("llama", class_name_of("llama"), refusals={"float32": "a | b"}, problems={"float64": "c"})
    ]
    old = PAGE.read_text(encoding="utf-8")
    page = with_results(old, trials, ["llama"])
    assert page.startswith("# Model families: 0 of the 1 causal")
    assert verdicts(page) == {"llama": "refused"}
    assert with_results(page, trials, ["llama"]) == page
    partial = with_results(old, trials, TYPES)
    assert verdicts(partial) == {**VERDICTS, "llama": "refused"}
    assert partial.startswith(
        f"# Model families: {list(verdicts(partial).values()).count(SERVED)} of the 189"
    )
    with pytest.raises(ValueError, match=r"families\.md lacks the lines"):
        with_results("# Model families\n", trials, ["llama"])
