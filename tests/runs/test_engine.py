"""One pass feeds all metrics layer by layer; a metric that fails does not affect the others."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import LayerView
from phaselens_plugins.attention_patterns import AttentionPatterns
from phaselens_plugins.sinks import Sinks
from tests.runs.metrics import Probe, probe
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (4, 9, 2, 6)]


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


@pytest.fixture
def streams(lens: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each forward."""
    calls: list[dict[str, Any]] = []
    stream = type(lens).stream

    def record_stream(self: Any, tokens: Any, hooks: Any, **options: Any) -> Any:
        calls.append({"shape": tuple(tokens.shape), "hooks": [name for name, _ in hooks], **options})
        return stream(self, tokens, hooks, **options)

    monkeypatch.setattr(type(lens), "stream", record_stream)
    return calls


def measure(lens: Any, *metrics: Any, **options: Any) -> Any:
    return phaselens.run(lens, metrics=list(metrics), texts=TEXTS, **options)


def test_all_metrics_share_one_forward_and_each_point_is_hooked_once(
    lens: Any, streams: list[dict[str, Any]]
) -> None:
    other_metric = probe(name="other", points=("blocks.{layer}.attn.hook_sink",))
    measure(lens, "sinks", probe(), other_metric)
    assert len(streams) == 1
    assert len(streams[0]["hooks"]) == len(set(streams[0]["hooks"])) == 2 * 3


def test_the_unembedding_is_not_computed_unless_a_metric_hooks_it(
    lens: Any, streams: list[dict[str, Any]]
) -> None:
    fired: list[bool] = []
    head = lens.original_model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda *_: fired.append(True))
    try:
        measure(lens, "sinks", probe())
        assert fired == []
        metric = probe(points=("unembed.hook_out",))
        run = measure(lens, metric)
    finally:
        handle.remove()
    assert [call["unembed"] for call in streams] == [False, True]
    assert fired == [True]
    assert [names for _, names, _ in metric.calls] == [("unembed.hook_out",)]
    assert run.failed == []


def test_a_metric_gets_its_layer_as_soon_as_all_its_points_have_fired(lens: Any) -> None:
    collected: list[Any] = []
    early_points = (
        "blocks.{layer}.attn.hook_q",
        "blocks.{layer}.attn.hook_v",
        "blocks.{layer}.attn.hook_sink",
    )
    early_metric = probe(name="early", points=early_points, calls=collected)
    late_metric = probe(
        name="late", points=("blocks.{layer}.hook_resid_post", "blocks.{layer}.attn.hook_q"), calls=collected
    )
    # The metric that needs the later point was named first, and is updated second.
    phaselens.run(lens, metrics=[late_metric, early_metric], texts=TEXTS[:1])
    names = ("attn.hook_q", "attn.hook_v", "attn.hook_sink"), ("attn.hook_q", "hook_resid_post")
    assert [(layer, points) for layer, points, _ in collected] == [
        (layer, points) for layer in range(lens.info.n_layers) for points in names
    ]


def test_layers_arrive_complete_and_in_order_and_other_points_alone(lens: Any) -> None:
    metric = probe(
        points=(
            "hook_embed",
            "blocks.{layer}.hook_resid_post",
            "blocks.{layer}.attn.hook_sink",
            "blocks.1.attn.hook_pattern",
            "ln_final.hook_normalized",
        )
    )
    measure(lens, metric)
    assert [(layer, set(names)) for layer, names, _ in metric.calls] == [
        (None, {"hook_embed"}),
        (0, {"attn.hook_sink", "hook_resid_post"}),
        (1, {"attn.hook_sink", "attn.hook_pattern", "hook_resid_post"}),
        (None, {"ln_final.hook_normalized"}),
    ]


def test_a_metric_receives_only_its_own_points(lens: Any) -> None:
    first, second = probe(), probe(name="second", points=("blocks.0.attn.hook_sink",))
    measure(lens, first, second)
    assert {names for _, names, _ in first.calls} == {("hook_resid_post",)}
    assert [(layer, names) for layer, names, _ in second.calls] == [(0, ("attn.hook_sink",))]


def test_every_text_is_passed_once_in_any_batches(lens: Any) -> None:
    metric = probe()
    measure(lens, metric, batch_tokens=14)
    batches = [texts for layer, _, texts in metric.calls if layer == 0]
    assert len(batches) > 1
    assert sorted(text for texts in batches for text in texts) == ["0", "1", "2", "3"]


def test_tables_are_in_the_order_of_the_texts(lens: Any) -> None:
    run = measure(lens, probe(), batch_tokens=14)
    assert run.table("probe", "texts").column("text").to_pylist() == [
        f"{i}" for i in range(4) for _ in range(2)
    ]


def test_each_sink_position_gets_its_own_pass_and_its_own_numbers(
    lens: Any, streams: list[dict[str, Any]]
) -> None:
    class SinksElsewhere(Sinks):
        name = "sinks-elsewhere"

    both_runs = measure(lens, "sinks", (SinksElsewhere, {"sink_position": 2}), probe())
    assert [call["sink_position"] for call in streams] == [0, 2]
    separate = measure(lens, ("sinks", {"sink_position": 2}))
    assert both_runs.rows("sinks-elsewhere", "texts").rows == separate.rows("sinks", "texts").rows
    assert both_runs.rows("sinks-elsewhere", "layers").rows != both_runs.rows("sinks", "layers").rows


def test_metrics_with_different_distances_share_a_pass(lens: Any, streams: list[dict[str, Any]]) -> None:
    class ManyDistances(AttentionPatterns):
        name = "many-distances"

    few_distances, many = {"distances": 2}, {"distances": 100}
    both_runs = measure(lens, ("attention-patterns", few_distances), (ManyDistances, many))
    assert [call["n_distances"] for call in streams] == [100]
    assert len(both_runs.rows("many-distances", "profile").rows) > len(
        both_runs.rows("attention-patterns", "profile").rows
    )
    separate = measure(lens, ("attention-patterns", few_distances))
    # Its neighbours that count as local, and the query's own key.
    assert [call["n_distances"] for call in streams[1:]] == [6]
    for table in ("texts", "heads", "profile"):
        shared_rows, separate_rows = (
            run.rows("attention-patterns", table).rows for run in (both_runs, separate)
        )
        assert len(shared_rows) == len(separate_rows) > 0
        for row, separate_row in zip(shared_rows, separate_rows, strict=True):
            assert row[:2] == separate_row[:2]
            # float32 sums of different lengths are added in a different order
            assert [*row[2:]] == pytest.approx([*separate_row[2:]], rel=1e-6, abs=1e-6, nan_ok=False)


@pytest.mark.parametrize("stage", ["construct", "hooks", "update", "compute"])
def test_a_metric_that_raises_is_failed_and_the_others_are_complete(lens: Any, stage: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("its own\nfault")

    broken_metric = probe(name="broken", **{"setup" if stage == "construct" else stage: fail})
    run = measure(lens, broken_metric, "sinks", probe())
    assert run.failed == ["broken"]
    (failure,) = run.metrics["broken"].failures
    assert (failure.model, failure.type, failure.message) == ("llama", "ZeroDivisionError", "its own fault")
    assert failure.stage == {"hooks": "construct"}.get(stage, stage)
    assert "ZeroDivisionError" in failure.traceback
    assert run.metrics["broken"].tables == {}
    assert run.rows("sinks", "layers") == measure(lens, "sinks").rows("sinks", "layers")
    assert len(run.rows("probe", "texts").rows) == 8


def test_a_failure_on_one_model_keeps_the_tables_of_the_other(lens: Any) -> None:
    class FailsOnSecond(Probe):
        name = "fails-on-second"

        def update(self, layer: LayerView) -> None:
            if self.model.label == "second":
                raise ValueError("not this one")
            super().update(layer)

    run = phaselens.run([lens, toy_lens(label="second")], metrics=FailsOnSecond, texts=TEXTS)
    assert run.failed == ["fails-on-second"]
    assert set(run.table("fails-on-second", "texts").column("model").to_pylist()) == {"llama"}


def test_an_unknown_hook_point_fails_the_metric_with_close_matches(lens: Any) -> None:
    run = measure(lens, probe(points=("blocks.{layer}.attn.hook_snik",)), "sinks")
    (failure,) = run.metrics["probe"].failures
    assert failure.type == "InputError"
    assert "no hook point 'blocks.0.attn.hook_snik'; did you mean blocks.0.attn.hook_sink" in failure.message
    assert run.metrics["sinks"].status == "ok"


def test_a_point_that_does_not_fire_fails_the_metric(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = type(lens).stream

    def without_some(self: Any, tokens: Any, hooks: Sequence[Any], **options: Any) -> Any:
        return stream(
            self, tokens, [pair for pair in hooks if pair[0] != "blocks.1.hook_resid_post"], **options
        )

    monkeypatch.setattr(type(lens), "stream", without_some)
    run = measure(lens, probe(), "sinks")
    assert str(run.metrics["probe"].failures[0]) == (
        "InputError in update on llama: hook point 'blocks.1.hook_resid_post' did not fire in this model's forward"
    )
    assert run.metrics["sinks"].status == "ok"


def test_tables_must_be_as_declared(lens: Any) -> None:
    def other(self: Probe) -> Any:
        return {"summary": self.table("texts", [])}

    def unknown(self: Probe) -> Any:
        return {"nothing": self.table("texts", [])}

    run = measure(lens, probe(name="other", compute=other), probe(name="unknown", compute=unknown))
    assert "table summary is not as other declares it" in run.metrics["other"].failures[0].message
    assert "unknown declares no table 'nothing'" in run.metrics["unknown"].failures[0].message


def test_a_number_that_is_not_finite_is_missing_with_a_warning(lens: Any) -> None:
    run = measure(lens, probe(compute=lambda self: {"summary": self.table("summary", [(float("inf"),)])}))
    assert run.rows("probe", "summary").rows == [("llama", None)]
    assert run.warnings == [
        "probe: llama: table summary, column value: 1 values were NaN or infinite, shown as missing"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()],
)
def test_a_batch_too_large_for_memory_names_the_options_to_lower(
    lens: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(type(lens), "stream", too_large)
    with pytest.raises(InputError, match=r"a batch of 2 × 10 tokens does not fit .*lower --batch-tokens"):
        measure(lens, "sinks")


def test_an_error_of_the_forward_itself_is_not_swallowed(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(lens), "stream", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(lens, "sinks")


def test_nothing_is_left_hooked_after_a_run(lens: Any) -> None:
    measure(lens, "sinks", probe())
    assert not [name for name, point in lens.hook_dict.items() if point.fwd_hooks or point._forward_hooks]
