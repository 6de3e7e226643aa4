"""The BOS policy of a run: the lens' own or the run's, for texts and for metrics' prompts, in results and notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

import phaselens
from phaselens.plugin import CausalMetric, Condition, Edit, Encoder, TaskPrompt
from phaselens.runs import load_model
from phaselens.runs.run_options import MetricRequest, ModelSpec
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.toys import save_checkpoint

METRICS = ["sinks", "bos-norm"]
PLAIN = ["to be or not to be", "that is the question"]


def load(bos: str = "auto", **options: bool) -> Any:
    return phaselens.load(
        tiny_model("llama"), label="tiny", tokenizer=tiny_tokenizer(**options), bos=bos, check=False
    )


def tables(run: Any) -> Any:
    return {name: result.as_dict()["tables"] for name, result in run.metrics.items()}


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_a_written_bos_changes_no_value(bos: str) -> None:
    lens = load()
    written = [f"<s>{PLAIN[0]}", f"<s><s>{PLAIN[1]}"]
    run = phaselens.run(lens, metrics=METRICS, texts=written, bos=bos)
    plain = phaselens.run(lens, metrics=METRICS, texts=PLAIN, bos=bos)
    assert tables(run) == tables(plain)
    note = f"tiny: texts '0', '1' themselves begin with BOS '<s>'; no second one is added (bos: {bos})"
    assert set(run.warnings) - set(plain.warnings) == {note}


def test_a_text_of_exactly_the_allowed_length_is_not_cut_for_its_written_bos() -> None:
    run = phaselens.run(load(), metrics="sinks", texts=["<s>abcd", "<s>abcde"], max_tokens=5)
    assert [(text.n_tokens["tiny"], text.cut["tiny"]) for text in run.texts] == [(5, False), (5, True)]


def test_an_appended_eos_is_not_measured() -> None:
    run = phaselens.run(load(adds_eos=True), metrics=METRICS, texts=PLAIN)
    plain = phaselens.run(load(), metrics=METRICS, texts=PLAIN)
    assert tables(run) == tables(plain)
    note = "tiny: the tokenizer appends '</s>' to a text; it is left out, because nothing continues a text after it"
    assert set(run.warnings) - set(plain.warnings) == {note}


class RecordsPolicy(CausalMetric[Any]):
    """Runs its own prompt, and records the BOS policy."""

    name, version = "records-policy", "1"
    policies: ClassVar[list[str]] = []

    def conditions(self) -> Sequence[Condition]:
        return [Condition("no MLP", [Edit("blocks.0.hook_mlp_out", 0.0)], layer=0)]

    def prompts(self, tokenizer: Any) -> Sequence[TaskPrompt]:
        self.policies.append(self.bos)
        encode = Encoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)
        return [TaskPrompt("one", encode("<s>abcd"))]


@pytest.mark.slow
@pytest.mark.parametrize(("lens_bos", "run_bos", "expected", "n_tokens"), [
    ("auto", None, "auto", 5),
    ("never", None, "never", 4),
    ("never", "always", "always", 5),
    ("always", "never", "never", 4),
])  # fmt: skip
def test_a_run_uses_the_lens_own_policy_unless_it_has_another(
    lens_bos: str, run_bos: str | None, expected: str, n_tokens: int
) -> None:
    RecordsPolicy.policies.clear()
    requests: list[MetricRequest] = ["sinks", RecordsPolicy]
    run = phaselens.run(load(lens_bos), metrics=requests, texts=["abcd"], bos=run_bos)
    assert run.texts[0].n_tokens["tiny"] == n_tokens
    assert RecordsPolicy.policies == [expected]
    (model,) = run.to_dict()["models"]
    assert (model["bos"], run.options["bos"], run.models[0].info.bos) == (expected, expected, lens_bos)
    assert not run.failed


def test_lenses_with_different_policies_keep_them() -> None:
    other_lens = phaselens.load(
        tiny_model("qwen2"), label="other", tokenizer=tiny_tokenizer(), bos="never", check=False
    )
    run = phaselens.run([load(), other_lens], metrics="sinks", texts=["abcd"])
    assert [model["bos"] for model in run.to_dict()["models"]] == ["auto", "never"]
    assert run.texts[0].n_tokens == {"tiny": 5, "other": 4}
    assert run.options["bos"] is None


@pytest.mark.slow
def test_models_named_by_text_are_loaded_with_the_runs_policy(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "toy")
    run = phaselens.run(str(folder), metrics="sinks", texts=["a b"], bos="never")
    assert (run.models[0].info.bos, run.models[0].bos, run.texts[0].n_tokens["toy"]) == ("never", "never", 2)
    lens = load_model(ModelSpec(str(folder)), bos="always")
    assert (lens.bos, lens.to_tokens("a b").tolist()) == ("always", [[0, 3, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("appends", [False, True])
def test_tasks_read_a_question_as_a_run_would(tmp_path: Path, appends: bool) -> None:
    """Answers follow the question itself, with one BOS in front and no EOS token between."""
    path = tmp_path / "questions.jsonl"
    item = {"kind": "parametric", "prompt": "to be or", "options": ["not", "to"], "answer": 0}
    results = []
    for front in ("", "<s>"):
        path.write_text(json.dumps(item | {"id": "q", "prompt": front + "to be or"}))
        requests: list[MetricRequest] = [("knowledge", {"file": str(path)})]
        results.append(phaselens.run(load(adds_eos=appends), metrics=requests, texts=["abcd"]))
    plain, written = results
    reference = phaselens.run(load(), metrics=requests, texts=["abcd"])
    assert plain.rows("knowledge", "items").rows == written.rows("knowledge", "items").rows
    assert plain.rows("knowledge", "items").rows == reference.rows("knowledge", "items").rows
    note = "knowledge: tiny: text 'q' itself begins with BOS '<s>'; no second one is added (bos: auto)"
    assert note in written.warnings
    assert note not in plain.warnings
