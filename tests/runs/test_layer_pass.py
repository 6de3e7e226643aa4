"""One forward for all metrics: groups by sink position, progress by layer, weights, and points that do not fire."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import Batch, LayerView
from phaselens.runs.active_metrics import ActiveMetric
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.layer_pass import LayerDispatcher, activate, forward, group_by_pass, reader_of
from phaselens.runs.observer import Observer
from phaselens.runs.result import MetricResult
from tests.runs.metrics import probe
from tests.toys import toy_lens

TOKENS = torch.tensor([[0, 5, 9, 13], [0, 8, 0, 0]])
SINK, POST = "blocks.{layer}.attn.hook_sink", "blocks.{layer}.hook_resid_post"


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(num_hidden_layers=4, dtype=torch.float64)


class LayerObserver(Observer):
    """Keeps how far each batch was read."""

    def __init__(self) -> None:
        self.read: list[float] = []

    def reading(self, n_tokens: float) -> None:
        self.read.append(n_tokens)


def batch() -> Batch:
    return Batch(("a", "b"), (0, 1), (4, 2), TOKENS)


def activated(lens: Any, **changes: Any) -> ActiveMetric:
    metric_class = probe(**changes)
    metric = metric_class(lens.info, metric_class.Params())
    return activate(lens, metric, MetricResult(metric_class, metric.params, ""))


def test_metrics_are_grouped_by_the_sink_position_that_they_need(lens: Any) -> None:
    first, second = (activated(lens, points=(SINK,), sink_position=position) for position in (2, 5))
    free = activated(lens, sink_position=7)
    without_points = activated(lens, points=())
    assert group_by_pass([without_points, free, second, first]) == {5: [second, free], 2: [first]}
    assert group_by_pass([without_points, free]) == {0: [free]}
    assert group_by_pass([without_points]) == {}
    assert group_by_pass([]) == {}
    mixed = activated(lens, points=(POST, SINK), sink_position=2)
    assert group_by_pass([first, mixed]) == {2: [first, mixed]}


def test_an_activated_metric_has_its_points_position_and_distances(lens: Any) -> None:
    active = activated(lens, points=(SINK, "hook_embed"), sink_position=3, n_distances=11)
    assert (active.sink_position, active.n_distances, active.has_values) == (3, 11, True)
    assert active.points == {
        **{SINK.format(layer=layer): (layer, "attn.hook_sink") for layer in range(4)},
        "hook_embed": (None, "hook_embed"),
    }
    with pytest.raises(InputError, match="no hook point"):
        activated(lens, points=("blocks.9.hook_resid_post",))
    with pytest.raises(TypeError, match="hooks"):
        activated(lens, hooks=lambda self: "hook_embed")

    from tests.lens.measured import model_of

    without_attention = phaselens.load(model_of("mamba"), label="mamba", check=False)
    missing = activated(without_attention, points=(SINK,))
    assert (missing.points, missing.has_values, missing.works) == ({}, False, True)
    assert missing.result.metric is type(missing.metric)

    class UnfinishedProbe(probe()):  # type: ignore[misc]
        """A metric that does not call its base class."""

        def __init__(self, *arguments: Any) -> None:
            return

    with pytest.raises(TypeError, match="__init__"):
        activate(lens, UnfinishedProbe(), active.result)


def test_progress_within_a_batch_is_by_layer(lens: Any) -> None:
    observer = LayerObserver()
    forward(lens, batch(), [activated(lens), activated(lens, points=(SINK,))], 0, observer)
    assert observer.read == [0.0, 1.5, 3.0, 4.5]  # of 6 tokens
    forward(lens, batch(), [activated(lens)], 0)


def test_a_forward_is_left_out_if_nothing_reads_the_batch(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a forward")

    monkeypatch.setattr(type(lens), "stream", refuse)
    unread = activated(lens, reads=lambda self, texts: False)
    broken = activated(lens, reads=lambda self, texts: 1 / 0)
    forward(lens, batch(), [unread, broken], 0)
    assert unread.works
    (failure,) = broken.result.failures
    assert (failure.model, failure.stage, failure.type) == ("llama", "reads", "ZeroDivisionError")


def test_a_metric_that_has_failed_or_skips_the_batch_gets_no_layer(lens: Any) -> None:
    calls: list[Any] = []
    skips = activated(lens, reads=lambda self, texts: texts.n != 2, calls=calls)
    reads = activated(lens, reads=lambda self, texts: texts.n == 2)
    forward(lens, batch(), [skips, reads], 0)
    assert calls == []
    assert [layer for layer, _, _ in type(reads.metric).calls] == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_statistics_are_those_of_the_pass(lens: Any) -> None:
    collected: dict[str, torch.Tensor] = {}

    def update(self: Any, layer: LayerView) -> None:
        if layer.index == 1:
            collected.update({name: layer[name].clone() for name in layer})

    points = (SINK, "blocks.{layer}.attn.hook_distance", "blocks.{layer}.attn.hook_pattern")
    two_distances = activated(lens, points=points, update=update, n_distances=2)
    three_distances = activated(lens, points=(SINK,), n_distances=3)
    forward(lens, batch(), [two_distances, three_distances], 1)
    pattern, sink = collected["attn.hook_pattern"], collected["attn.hook_sink"]
    torch.testing.assert_close(sink[0, :, 1:], pattern[0, :, 1:, 1].to(sink.dtype), atol=1e-6, rtol=0)
    assert collected["attn.hook_distance"].shape[-1] == 3


def test_a_layer_has_its_weights_texts_and_activations_as_copies(lens: Any) -> None:
    layers: list[int | None] = []

    def update(self: Any, layer: LayerView) -> None:
        layers.append(layer.index)
        weight = layer.weight("mlp.W_out")
        assert torch.equal(weight, lens.weight_of(layer.index, "mlp.W_out"))
        projection = layer.projection("attn.W_O")
        assert torch.equal(projection.weight, lens.projection_of(layer.index, "attn.W_O").weight)
        weight.zero_()
        projection.weight.zero_()
        layer.batch.tokens.zero_()
        layer["hook_resid_post"].zero_()

    texts = batch()
    tokens = TOKENS.clone()
    plain: list[torch.Tensor] = []
    reads = activated(lens, update=lambda self, layer: plain.append(layer["hook_resid_post"].clone()))
    spoils = activated(lens, update=update)
    forward(lens, texts, [spoils, reads], 0)
    assert not spoils.result.failures, spoils.result.failures[0].traceback
    assert layers == [0, 1, 2, 3]
    assert torch.equal(texts.tokens, tokens)
    assert bool(lens.weight_of(1, "mlp.W_out").any())
    final = lens.stream(TOKENS, stop_at_layer=4, lengths=torch.tensor([4, 2]))
    torch.testing.assert_close(plain[-1], final)


def test_activations_come_in_the_order_in_which_they_fired(lens: Any) -> None:
    names: list[tuple[str, ...]] = []
    points = (POST, "blocks.{layer}.attn.hook_v", "blocks.{layer}.hook_resid_pre")
    forward(
        lens,
        batch(),
        [activated(lens, points=points, update=lambda self, layer: names.append(tuple(layer)))],
        0,
    )
    assert names == [("hook_resid_pre", "attn.hook_v", "hook_resid_post")] * 4


class Fired:
    """The dispatcher of some metrics, whose hooks a test calls as a forward would."""

    def __init__(self, lens: Any, *metrics: ActiveMetric, observer: Observer | None = None) -> None:
        self.dispatcher = LayerDispatcher(lens, batch(), list(map(reader_of, metrics)), observer)

    def __call__(self, *names: str) -> Fired:
        for name in names:
            self.dispatcher.hook(name)(torch.ones(2, 4, 32), None)
        return self


def test_points_that_a_layer_leaves_out_do_not_reach_the_next(lens: Any) -> None:
    updates: list[tuple[int | None, tuple[str, ...]]] = []
    points = (POST, "blocks.{layer}.hook_mlp_out", "hook_embed")
    metric = activated(
        lens, points=points, update=lambda self, layer: updates.append((layer.index, tuple(layer)))
    )
    fired = Fired(lens, metric)("hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    assert updates == [(None, ("hook_embed",)), (0, ("hook_mlp_out",))]  # when layer 1 began
    fired("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    assert updates[2:] == [(1, ("hook_mlp_out", "hook_resid_post"))]
    fired.dispatcher.finish_layer()
    fired.dispatcher.finish_layer()
    assert updates[3:] == [(2, ("hook_resid_post",))]


def test_a_point_that_never_fires_fails_its_metric_by_name(lens: Any) -> None:
    complete = activated(lens, points=("hook_embed",))
    silent = activated(lens, points=("hook_embed", "ln_final.hook_normalized"))
    broken = activated(lens, points=("hook_embed", "ln_final.hook_scale"), update=lambda self, layer: 1 / 0)
    Fired(lens, broken, silent, complete)("hook_embed").dispatcher.require_fired()
    assert complete.works
    (failure,) = silent.result.failures
    assert (failure.model, failure.stage) == ("llama", "update")
    assert "hook point 'ln_final.hook_normalized' did not fire" in failure.message
    # Its own mistake is reported, and not also what followed from it.
    assert [failure.type for failure in broken.result.failures] == ["ZeroDivisionError"]


def test_a_forward_that_does_not_fit_into_memory_is_named(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(lens), "stream", out_of_memory)
    with pytest.raises(BatchTooLarge, match="llama: a batch of 2 × 4 tokens does not fit"):
        forward(lens, batch(), [activated(lens)], 0)


def test_gradients_are_off(lens: Any) -> None:
    tracked: list[bool] = []

    def update(self: Any, layer: LayerView) -> None:
        tracked.append(torch.is_grad_enabled() or layer["hook_resid_post"].requires_grad)

    with torch.enable_grad():
        forward(lens, batch(), [activated(lens, update=update)], 0)
    assert tracked == [False] * 4


def test_a_metric_gets_of_an_incomplete_layer_only_its_own_points(lens: Any) -> None:
    collected: dict[str, tuple[str, ...]] = {}

    def reading(name: str, *points: str) -> ActiveMetric:
        def update(self: Any, layer: LayerView) -> None:
            collected[name] = tuple(layer)

        return activated(lens, points=points, update=update)

    pre, mlp = "blocks.{layer}.hook_resid_pre", "blocks.{layer}.hook_mlp_out"
    metrics = [reading("first", pre, POST), reading("second", mlp, POST)]
    Fired(lens, *metrics)("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out").dispatcher.finish_layer()
    assert collected == {"first": ("hook_resid_pre",), "second": ("hook_mlp_out",)}


def test_a_layer_that_runs_again_is_read_once(lens: Any) -> None:
    layers: list[int | None] = []
    metric = activated(lens, update=lambda self, layer: layers.append(layer.index))
    points = [POST.format(layer=layer) for layer in (0, 1, 0, 1)]
    Fired(lens, metric)(*points).dispatcher.finish_layer()
    assert layers == [0, 1]
    assert metric.works


def test_texts_of_a_batch_are_rotated_by_their_own_length() -> None:
    from tests.lens.test_frequencies import N_CTX, fresh, padded, text

    lens = phaselens.load(fresh("dynamic"), check=False)
    collected: list[torch.Tensor] = []
    metric = activated(lens, update=lambda self, layer: collected.append(layer["hook_resid_post"].clone()))
    texts = Batch(("a", "b"), (0, 1), (9, 2 * N_CTX), padded([9, 2 * N_CTX]))
    forward(lens, texts, [metric], 0)
    separate = lens.stream(text(9), stop_at_layer=len(collected))
    torch.testing.assert_close(collected[-1][:1, :9], separate, atol=1e-5, rtol=0)
