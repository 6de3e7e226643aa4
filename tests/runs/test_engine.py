"""One pass feeds all metrics a layer at a time; a metric that fails hurts no other."""

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
    """What each forward was asked for."""
    calls: list[dict[str, Any]] = []
    stream = type(lens).stream

    def noted(self: Any, tokens: Any, hooks: Any, **options: Any) -> Any:
        calls.append({"shape": tuple(tokens.shape), "hooks": [name for name, _ in hooks], **options})
        return stream(self, tokens, hooks, **options)

    monkeypatch.setattr(type(lens), "stream", noted)
    return calls


def measure(lens: Any, *metrics: Any, **options: Any) -> Any:
    return phaselens.run(lens, metrics=list(metrics), texts=TEXTS, **options)


def test_all_metrics_share_one_forward_and_each_point_is_hooked_once(
    lens: Any, streams: list[dict[str, Any]]
) -> None:
    other = probe(name="other", points=("blocks.{layer}.attn.hook_sink",))
    measure(lens, "sinks", probe(), other)
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
    assert [names for _, names, _ in metric.seen] == [("unembed.hook_out",)]
    assert run.failed == []


def test_a_metric_gets_its_layer_as_soon_as_all_of_it_has_come(lens: Any) -> None:
    seen: list[Any] = []
    first = ("blocks.{layer}.attn.hook_q", "blocks.{layer}.attn.hook_v", "blocks.{layer}.attn.hook_sink")
    early = probe(name="early", points=first, seen=seen)
    late = probe(
        name="late", points=("blocks.{layer}.hook_resid_post", "blocks.{layer}.attn.hook_q"), seen=seen
    )
    # The one that waits longer was named first, and is served second.
    phaselens.run(lens, metrics=[late, early], texts=TEXTS[:1])
    names = ("attn.hook_q", "attn.hook_v", "attn.hook_sink"), ("attn.hook_q", "hook_resid_post")
    assert [(layer, points) for layer, points, _ in seen] == [
        (layer, points) for layer in range(lens.info.n_layers) for points in names
    ]


def test_layers_come_whole_in_order_and_points_outside_of_layers_alone(lens: Any) -> None:
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
    assert [(layer, set(names)) for layer, names, _ in metric.seen] == [
        (None, {"hook_embed"}),
        (0, {"attn.hook_sink", "hook_resid_post"}),
        (1, {"attn.hook_sink", "attn.hook_pattern", "hook_resid_post"}),
        (None, {"ln_final.hook_normalized"}),
    ]


def test_a_metric_is_handed_only_what_it_asked_for(lens: Any) -> None:
    first, second = probe(), probe(name="second", points=("blocks.0.attn.hook_sink",))
    measure(lens, first, second)
    assert {names for _, names, _ in first.seen} == {("hook_resid_post",)}
    assert [(layer, names) for layer, names, _ in second.seen] == [(0, ("attn.hook_sink",))]


def test_every_text_is_handed_out_once_whatever_the_batches(lens: Any) -> None:
    metric = probe()
    measure(lens, metric, batch_tokens=14)
    first = [texts for layer, _, texts in metric.seen if layer == 0]
    assert len(first) > 1
    assert sorted(text for texts in first for text in texts) == ["0", "1", "2", "3"]


def test_tables_come_in_the_order_of_the_texts(lens: Any) -> None:
    run = measure(lens, probe(), batch_tokens=14)
    assert run.table("probe", "texts").column("text").to_pylist() == [
        f"{i}" for i in range(4) for _ in range(2)
    ]


def test_each_sink_position_gets_its_own_pass_and_its_own_numbers(
    lens: Any, streams: list[dict[str, Any]]
) -> None:
    class Third(Sinks):
        name = "third"

    both = measure(lens, "sinks", (Third, {"sink_position": 2}), probe())
    assert [call["sink_position"] for call in streams] == [0, 2]
    alone = measure(lens, ("sinks", {"sink_position": 2}))
    assert both.rows("third", "texts").rows == alone.rows("sinks", "texts").rows
    assert both.rows("third", "layers").rows != both.rows("sinks", "layers").rows


def test_metrics_that_want_other_distances_share_a_pass(lens: Any, streams: list[dict[str, Any]]) -> None:
    class Far(AttentionPatterns):
        name = "far"

    few, many = {"distances": 2}, {"distances": 100}
    both = measure(lens, ("attention-patterns", few), (Far, many))
    assert [call["n_distances"] for call in streams] == [100]
    assert len(both.rows("far", "profile").rows) > len(both.rows("attention-patterns", "profile").rows)
    alone = measure(lens, ("attention-patterns", few))
    # Its neighbours that count as local, and the query's own key.
    assert [call["n_distances"] for call in streams[1:]] == [6]
    for table in ("texts", "heads", "profile"):
        together, apart = (run.rows("attention-patterns", table).rows for run in (both, alone))
        assert len(together) == len(apart) > 0
        for row, same in zip(together, apart, strict=True):
            assert row[:2] == same[:2]
            # float32 sums of another length are taken in another order
            assert [*row[2:]] == pytest.approx([*same[2:]], rel=1e-6, abs=1e-6, nan_ok=False)


@pytest.mark.parametrize("stage", ["construct", "hooks", "update", "compute"])
def test_a_metric_that_raises_is_failed_and_the_others_are_complete(lens: Any, stage: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("its own\nfault")

    broken = probe(name="broken", **{"setup" if stage == "construct" else stage: fail})
    run = measure(lens, broken, "sinks", probe())
    assert run.failed == ["broken"]
    (failure,) = run.metrics["broken"].failures
    assert (failure.model, failure.type, failure.message) == ("llama", "ZeroDivisionError", "its own fault")
    assert failure.stage == {"hooks": "construct"}.get(stage, stage)
    assert "ZeroDivisionError" in failure.traceback
    assert run.metrics["broken"].tables == {}
    assert run.rows("sinks", "layers") == measure(lens, "sinks").rows("sinks", "layers")
    assert len(run.rows("probe", "texts").rows) == 8


def test_a_failure_on_one_model_keeps_the_tables_of_the_other(lens: Any) -> None:
    class Picky(Probe):
        name = "picky"

        def update(self, layer: LayerView) -> None:
            if self.model.label == "second":
                raise ValueError("not this one")
            super().update(layer)

    run = phaselens.run([lens, toy_lens(label="second")], metrics=Picky, texts=TEXTS)
    assert run.failed == ["picky"]
    assert set(run.table("picky", "texts").column("model").to_pylist()) == {"llama"}


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


def test_a_number_that_is_not_finite_becomes_null_with_a_warning(lens: Any) -> None:
    run = measure(lens, probe(compute=lambda self: {"summary": self.table("summary", [(float("inf"),)])}))
    assert run.rows("probe", "summary").rows == [("llama", None)]
    assert run.warnings == [
        "probe: llama: table summary, column value: 1 values were NaN or infinite, shown as null"
    ]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()],
)
def test_a_batch_too_large_for_memory_says_what_to_lower(
    lens: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(type(lens), "stream", too_large)
    with pytest.raises(InputError, match=r"a batch of 4 × 10 tokens does not fit .*lower --batch-tokens"):
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
